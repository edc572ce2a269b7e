PYTHON ?= python3
PY := .venv/bin/python
RUNS := runs/demo

.PHONY: setup demo test lint bench

setup: .venv/ready

# Rebuilt only when requirements.txt changes; `ready` is written last, so an interrupted install starts again.
.venv/ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

test: setup
	$(PY) -m pytest

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# The whole pipeline on the digits inside scikit-learn: a robust teacher, AdaAD and AdaAD+IGDM, and their comparison.
# A demo that was interrupted goes on where it stopped; remove runs/demo to begin anew.
DIGITS := --dataset digits --batch 64 --epsilon 0.15 --step_size 0.0375 --epochs 10 --run_dir $(RUNS)
STUDENT := $(DIGITS) --teacher $(RUNS)/teacher --student RES-8 --eval_after 4 --aa_examples 100

demo: $(RUNS)/adaad/result.json $(RUNS)/adaad_IGDM/result.json
	$(PY) compare.py $(RUNS)/adaad $(RUNS)/adaad_IGDM

$(RUNS)/teacher/result.json: | .venv/ready
	$(PY) train_teacher.py $(DIGITS) --model RES-20 --run_name teacher --aa_examples 0

$(RUNS)/adaad/result.json: $(RUNS)/teacher/result.json
	$(PY) adaad_cifar100.py $(STUDENT) --run_name adaad

$(RUNS)/adaad_IGDM/result.json: $(RUNS)/teacher/result.json
	$(PY) adaad_IGDM_cifar100.py $(STUDENT) --alpha 5 --ramp_epochs 10 --run_name adaad_IGDM
