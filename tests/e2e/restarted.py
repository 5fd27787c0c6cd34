"""What stands in for `umt-hf` where the loop of docs/pretraining.md is run: a tiny run that is killed at its start."""

import os
import sys
from pathlib import Path

from tests.faults.kill import Kill, Killer
from umt_hf.training import stage1


def main(words: list[str]) -> None:
    """Run stage 1 with the flags of a file in place of those of the page; the first start ends by SIGKILL."""
    folder = Path(os.environ["UMT_HF_TEST_FOLDER"])
    assert words[:2] == ["pretrain", "stage1"] and words[-2:] == ["--resume_from_checkpoint", "auto"], words
    starts = folder / "starts"
    with starts.open("a") as file:
        file.write("started\n")
    if len(starts.read_text().splitlines()) == 1:
        (folder / "process_0").write_text(str(os.getpid()))
        Killer(Kill("rename", count=2), folder).install()
    sys.argv = ["stage1", *(folder / "flags").read_text().splitlines(), *words[-2:]]
    stage1.main()


if __name__ == "__main__":
    main(sys.argv[1:])
