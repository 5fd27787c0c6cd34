"""ZeroGPU, of which a stand-in for its package runs functions in another process; values and results are pickles."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import umt_hf
from umt_hf.demo import zero_gpu

pytest.importorskip("gradio")

SPACES = '''
"""Stand-in for the package `spaces`: what a function gets and gives crosses the border between two processes."""

import multiprocessing
import pickle

durations, calls = [], []


def GPU(duration):
    durations.append(duration)

    def decorate(function):
        def call(*values):
            context = multiprocessing.get_context("fork")
            receiver, sender = context.Pipe(duplex=False)
            sent = pickle.dumps(values)

            def work():
                try:
                    sender.send((True, function(*pickle.loads(sent))))
                except Exception as error:
                    sender.send((False, error))

            process = context.Process(target=work)
            process.start()
            done, result = receiver.recv()
            process.join()
            calls.append(values[1:])
            if not done:
                raise result
            return result

        return call

    return decorate
'''
VISIT = """
import json, sys
import torch

torch.set_num_threads(1)
import spaces
from umt_hf.demo import app
from umt_hf.demo.settings import DemoSettings
from tests.demo.test_uploads import call, upload

given = json.loads(sys.argv[1])
demo = app.launch_demo(DemoSettings(**given["settings"]), block=False)
path = upload(demo.local_url, "clip.mp4", open(given["clip"], "rb").read())
found = {"labels": call(demo.local_url, "classify", path)}
print(json.dumps({"found": found, "durations": spaces.durations, "calls": spaces.calls}))
"""


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks, which this system does not")
def test_models_answer_in_the_process_that_has_the_gpu(settings, models, clips, tmp_path):
    (tmp_path / "spaces.py").write_text(SPACES)
    root = Path(umt_hf.__file__).parents[1]
    given = json.dumps({"settings": {"classifier": settings.classifier}, "clip": str(clips / "00002.mp4")})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-c", VISIT, given]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    reply = json.loads(run.stdout.splitlines()[-1])
    expected = [asdict(scored) for scored in models.classifier.classify(str(clips / "00002.mp4"))]
    assert str(expected[0]["label"]) in json.dumps(reply["found"]["labels"])
    assert reply["durations"] == [zero_gpu.SECONDS]
    assert [own[:2] for own in reply["calls"]][-1:] == [["classifier", "classify"]]


def test_without_the_package_nothing_is_decorated(models, clips):
    assert zero_gpu.choose_runner(None) is zero_gpu.choose_runner(object()) is zero_gpu._ask_model
    number = zero_gpu.register_page(models)
    found = zero_gpu.ask_model(number, "classifier", "classify", str(clips / "00002.mp4"))
    assert found == models.classifier.classify(str(clips / "00002.mp4"))
