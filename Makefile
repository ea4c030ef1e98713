# make quickstart   the main job: a real model goes round its whole life (set-up included)
# make test         the tests (set-up included)
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
# Inherited, it would make every Python start compile everything again.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTHON ?= python3
READY := .venv/.ready

.PHONY: help setup quickstart quickstart-tiny test tools lint docs clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

setup: $(READY)

# torch first and by pip: where a CPU build lies at hand, pip finds it; uv would fetch gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	@started=$$SECONDS; at() { echo "setup: $$1 ($$((SECONDS - started)) s)"; }; \
	test -x .venv/bin/python || $(PYTHON) -m venv .venv; \
	pip install --quiet --constraint constraints.txt --upgrade pip torch uv 2>&1 | { grep -v '^WARNING: Location' || true; }; at "torch"; \
	uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[all]' --group dev; at "packages, compiled"; \
	touch $(READY); at "ready: .venv, $$(du -sh .venv | cut -f1)"

quickstart: setup
	python quickstart/prepare.py
	fmops run --spec quickstart/lifecycle.yaml

quickstart-tiny: setup
	python quickstart/prepare.py --tiny
	fmops run --spec quickstart/tiny.yaml --workspace quickstart/.fmops-tiny

# Three for two cores: servers, Terraform and Ray make their tests wait.
test: setup tools
	pytest -n 3 --dist loadgroup --durations 40 --durations-min 8

# What the tests of the infrastructure call: helm and promtool, checkov in an environment of its own.
tools: $(READY)
	$(MAKE) --no-print-directory -C infra tools

lint: setup
	ruff check . && ruff format --check . && mypy

clean:
	rm -rf .venv quickstart/data quickstart/data-tiny quickstart/.fmops quickstart/.fmops-tiny
