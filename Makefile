# `make night` and `make test` do all the set-up they need, in .venv. Nothing else has to be known.
# The installer is uv where it is there, else pip. Where a local folder of wheels is configured for pip
# (PIP_FIND_LINKS), uv is told of it too, so that both take the same torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= smoke

.PHONY: night test lint clean
.DEFAULT_GOAL := night

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@links="$${PIP_FIND_LINKS:-$$($(BIN)/pip config get global.find-links 2>/dev/null || true)}"; \
	if command -v uv >/dev/null 2>&1 && { [ -z "$$links" ] || ls $$links/torch-*.whl >/dev/null 2>&1; }; then \
		UV_FIND_LINKS="$$links" uv pip install --python $(BIN)/python -c constraints.txt -e . --group dev; \
	else \
		$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' && \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev; \
	fi
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "GPU" if torch.cuda.is_available() else "CPU")'
	@touch $@

night: $(VENV)/.ready
	$(BIN)/harness doctor
	$(BIN)/harness search search_spaces/smoke.toml --study $(STUDY) $(if $(wildcard runs/$(STUDY)/ledger.jsonl),--resume); \
		code=$$?; [ $$code -eq 0 ] || [ $$code -eq 3 ] || exit $$code
	$(BIN)/harness audit $(STUDY)

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
