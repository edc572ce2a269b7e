PYTHON ?= python3
PY := .venv/bin/python
RUNS := runs/demo
# One thread for digits and tests: operations this small gain little from a second one, and two threads that wait for
# each other after every operation crawl, a hundred times slower, as soon as something else wants a core.
ONE := OMP_NUM_THREADS=1

.PHONY: setup demo test test-faults test-bare lint bench

setup: .venv/ready

# Rebuilt only when requirements.txt changes; `ready` is written last, so an interrupted install starts again.
.venv/ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

test: setup
	$(ONE) $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

# Kills, starves and feeds garbage to real runs for some 40 minutes; rewrites docs/reliability.md.
test-faults: setup
	$(PY) tests/fault_run.py --write docs/reliability.md

# All that a bare GPU machine would run, on the CPU, with the packages blocked that it lacks; some minutes.
test-bare: setup
	$(ONE) $(PY) tests/bare_machine.py

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# The whole pipeline on the digits inside scikit-learn: a robust teacher, AdaAD and AdaAD+IGDM, and their comparison.
# The same command resumes an interrupted demo; remove runs/demo to start again. docs/tutorial.md shows its table:
#   python compare.py runs/demo/adaad runs/demo/adaad_IGDM --records docs/results/demo.json
#   python compare.py docs/results/demo.json --insert docs/tutorial.md
DIGITS := --dataset digits --batch 64 --epsilon 0.15 --step_size 0.0375 --epochs 10 --run_dir $(RUNS)
STUDENT := $(DIGITS) --teacher $(RUNS)/teacher --student RES-8 --eval_after 4 --aa_examples 360

demo: $(RUNS)/adaad/result.json $(RUNS)/adaad_IGDM/result.json
	$(PY) compare.py $(RUNS)

$(RUNS)/teacher/result.json: | .venv/ready
	$(ONE) $(PY) train_teacher.py $(DIGITS) --model RES-20 --run_name teacher --aa_examples 0

$(RUNS)/adaad/result.json: $(RUNS)/teacher/result.json
	$(ONE) $(PY) adaad_cifar100.py $(STUDENT) --run_name adaad

$(RUNS)/adaad_IGDM/result.json: $(RUNS)/teacher/result.json
	$(ONE) $(PY) adaad_IGDM_cifar100.py $(STUDENT) --alpha 5 --ramp_epochs 10 --run_name adaad_IGDM

# The figures of docs/performance_tables.md at a size for CPUs; on a GPU run the modules with their defaults. On a machine that
# does something else at the same time: OMP_NUM_THREADS=1 make bench.
# INSERT=docs/performance_tables.md also writes the tables between their markers there.
BENCH := --device cpu --teacher WRN-16-4 --batch 16
CPU_TRICKS := product "without folding BatchNorm" "without channels_last" "without reuse of passes" "without all three"
BFLOAT16 := $(shell grep -m 1 -o -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null)
bench = $(PY) -m benchmarks.$(1) $(2) --out runs/bench/$(1)_cpu$(3).json

bench: setup
	$(call bench,training_step,$(BENCH) --rounds 3 --profile 1 --tricks $(CPU_TRICKS))
	$(call bench,evaluation,--device cpu --examples 16 --batch 16 --product_batch 16 --rounds 3 --aa_student RES-8 \
		--aa_examples 2 --aa_batches 2)
	$(if $(BFLOAT16),$(call bench,training_step,$(BENCH) --rounds 4 --methods rslad_IGDM adaad_IGDM \
		--precisions bf16,_bf16))
	$(if $(INSERT),$(PY) -m benchmarks.report runs/bench --insert $(INSERT))
