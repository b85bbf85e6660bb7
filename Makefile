# Everything runs from .venv, which the first target to need it sets up; python3 and make are all that must be there.

PYTHONS := python3 python3.13 python3.12 python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
PARALLEL_TESTS := tests/unit tests/contract

.DEFAULT_GOAL := help
.PHONY: help demo check test test-long lint style

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(INSTALLED) ## train on this machine: nodes are lost, killed and added; ends with a report
	@$(BIN)/solvent demo

# The type checker takes a processor for a minute or two, and tests wait at times: they run side by side.
types = $(BIN)/basedpyright --pythonpath $(BIN)/python
beside_types = @$(types) & types=$$!; { $(1); }; rest=$$?; wait $$types && exit $$rest

# The tests of a file share a cluster or a world, so a process takes a whole file.
BY_FILE := -n 3 --dist loadfile --no-loadscope-reorder

# Real processes, clocks and clusters on a machine that may be busy with something else: what fails is tried once more,
# in a new process, one test at a time. What fails twice fails; what passes then is told last, and few of those are
# tolerated (tests/second_try.py).
again = SOLVENT_SECOND_TRY=1 $(BIN)/python -m pytest --last-failed --last-failed-no-failures none
tested = $(BIN)/python -m pytest $(1) $(2) || $(again) $(2)

test: style ## lint, and all tests but those that take minutes each
	@$(BIN)/python -m tests.second_try begin
	$(call beside_types,$(call tested,-n 3,$(PARALLEL_TESTS)))
	$(call tested,$(BY_FILE) --durations=25,$(PARALLEL_TESTS:%=--ignore=%))
	@$(BIN)/python -m tests.second_try end

test-long: $(INSTALLED) ## minutes each: chaos by lot, supervised runs, ends of pods, machines cut off, lost heads, leases, power cuts, the guide
	@$(BIN)/python -m tests.second_try begin
	$(call tested,,-m long)
	@$(BIN)/python -m tests.second_try end

check: style ## before each commit: lint, and the tests of tests/unit
	$(call beside_types,$(BIN)/python -m pytest -q -n 2 tests/unit)

lint: style ## style, types and who may import whom
	$(types)

style: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then break; fi; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Solvent needs Python 3.11, 3.12 or 3.13, and none of $(PYTHONS) is one of them. Install one and call make again." >&2; \
	  exit 1; \
	fi; \
	echo "Setting up .venv with $$python; this takes a minute or two."; \
	$$python -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
