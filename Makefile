# Everything runs in an environment of its own, made at first use from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
DATA ?= ../shared/data
# Processes of the tests: as many as there are cores, with 2 GB of memory for each.
WORKERS ?= 2
PEERS := .venv-bench
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test demo truth faults bench bench-peers study study-small lint docs clean

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15

demo: $(VENV)/.demo
	$(BIN)/python models/quickstart.py

bench: $(VENV)/.test $(PEERS)/.peers
	$(BIN)/python tests/benchmarks/step_and_prediction.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/prediction_noise.py
	$(BIN)/python tests/benchmarks/guide_scale.py
	$(BIN)/python tests/benchmarks/warm_start.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/sweeps.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/linear_algebra.py
	OMP_NUM_THREADS=1 $(PEERS)/bin/python tests/benchmarks/peers.py

bench-peers: $(PEERS)/.peers
	OMP_NUM_THREADS=1 $(PEERS)/bin/python tests/benchmarks/peers.py

truth: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/truth.py

faults: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/planted_faults.py

# DATA is a folder with a folder of parquet files per task (docs/study.md); both go on where they were cut off.
study: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python models/study/study.py --data $(DATA) --out out/study

study-small: $(VENV)/.demo
	$(BIN)/python models/study/study.py --data $(DATA) --out out/study-small --small

lint: $(VENV)/.test
	$(BIN)/ruff check .

# Internal links and references are checked; other sites are not asked.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs out/docs
	@echo "Wrote out/docs/index.html"

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 to 3.13, got %d.%d; write make PYTHON=python3.11" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] < (3, 14) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[demo,test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) -e '.[demo,docs]'
	@touch $@

# laplace-torch and backpack ask for torchvision, which brings another torch: all of it is named, nothing pulled in.
$(PEERS)/.peers: pyproject.toml constraints.txt tests/benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[demo,peft]'
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/benchmarks/peers.txt
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) out build dist *.egg-info
