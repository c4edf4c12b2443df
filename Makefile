# Two front doors. Everything else is a session of noxfile.py: .venv/bin/nox --list
PYTHON ?= python3
NOX := .venv/bin/nox

.PHONY: demo test

demo: $(NOX)
	$(NOX) --session demo

test: $(NOX)
	$(NOX)

$(NOX):
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "nox>=2025.2.9"
