PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-slow test-gpu check fuzz soak dist check-dist

demo: .venv/installed
	.venv/bin/pixeldecoder demo --overwrite

# The networks are tiny: a process for each core, not a thread.
test: .venv/installed-test check
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist worksteal

test-slow: .venv/installed-test
	.venv/bin/pytest -m slow

test-gpu: .venv/installed-test
	.venv/bin/pytest -m gpu

# Every fault at random moments, then mixed load with faults injected.
MINUTES ?= 60
soak: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/pytest -m slow tests/faults
	.venv/bin/python recipes/soak.py --minutes $(MINUTES)

dist:
	rm -rf dist
	$(PYTHON) -m venv build/env
	build/env/bin/python -m pip install --quiet build
	build/env/bin/python -m build --outdir dist

# The wheel alone, and then each extra, in a new environment.
check-dist: dist
	rm -rf build/fresh
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && fresh/bin/python ../tests/release.py alone
	for extra in lora onnx quantize serve ray train evaluate bulk iqa; do \
		build/fresh/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[$$extra]" && \
		(cd build && fresh/bin/python ../tests/release.py $$extra) || exit 1; \
	done

check: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	PYTHONPATH=src .venv/bin/lint-imports --no-cache --no-logo

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	touch $@

# CASES: of each parser of usual speed; 60000 are about a million in all.
CASES ?= 60000
fuzz: .venv/installed-test
	nice .venv/bin/python tests/fuzz.py --cases $(CASES)
