.DEFAULT_GOAL := help
.PHONY: help install train eval predict compare profile test test-all test-compiled test-gpu lint format bench bench-gpu bench-report clean
PY := .venv/bin/python

# The hardware decides what is installed: make install ACCELERATOR=cpu|cuda|cuda12|tpu overrides it.
# CUDA 13 wants a driver of 580 or newer; an older one gets CUDA 12.
NVIDIA_DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | grep -oE '^[0-9]+')
TPU := $(wildcard /dev/accel0 /dev/vfio/0)
ACCELERATOR ?= $(if $(NVIDIA_DRIVER),$(shell test $(NVIDIA_DRIVER) -ge 580 && echo cuda || echo cuda12),$(if $(TPU),tpu,cpu))
comma := ,
EXTRAS := dev$(if $(filter-out cpu,$(ACCELERATOR)),$(comma)$(ACCELERATOR))
STAMP := .venv/.installed-$(ACCELERATOR)
export EXP RUN
UV := $(shell command -v uv 2>/dev/null)

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'
	@echo '  ARGS="..." adds options: make train EXP=mlp_bf16 ARGS="--steps 500"'

$(STAMP): pyproject.toml constraints.txt
	@echo "installing for $(ACCELERATOR) into .venv"
ifdef UV
	@test -x $(PY) || uv venv -q .venv
	@uv pip install -q -p $(PY) -c constraints.txt -e '.[$(EXTRAS)]'
else
	@$(PY) -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
endif
	@touch $@

install: $(STAMP)  ## make .venv and install, for the hardware that is here

train: $(STAMP)  ## train an experiment: make train EXP=mlp_bf16
	@$(PY) -m jmp_train train $${EXP:+"$$EXP"} $(ARGS)

eval: $(STAMP)  ## evaluate a run: make eval RUN=runs/mlp_bf16/TIME
	@$(PY) -m jmp_train eval $${RUN:+"$$RUN"} $(ARGS)

predict: $(STAMP)  ## continue a text with a run: make predict RUN=runs/gpt_fp32/TIME
	@$(PY) -m jmp_train predict $${RUN:+"$$RUN"} $(ARGS)

compare: $(STAMP)  ## one family in fp32, fp16 and bf16: make compare EXP=mlp
	@$(PY) -m jmp_train compare $${EXP:+"$$EXP"} $(ARGS)

profile: $(STAMP)  ## trace some steps, for Perfetto: make profile EXP=mlp_bf16
	@$(PY) -m jmp_train profile $${EXP:+"$$EXP"} $(ARGS)

# Most of a quick test's time is compilation, so XLA compiles them without optimising for the CPU, and
# in jaxlib 0.10, whose successors end at this flag, without its slower way to make fusions; test-all
# compiles as users do.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
    --xla_cpu_parallel_codegen_split_count=1
QUICK_0.10 := $$(ls .venv/lib/python*/site-packages | grep -q '^jaxlib-0\.10\.' \
    && echo --xla_cpu_use_fusion_emitters=false)

test: $(STAMP)  ## the tests, on the CPU, in under 6 minutes
	JAX_PLATFORMS=cpu XLA_FLAGS="$(QUICK) $(QUICK_0.10) $$XLA_FLAGS" $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(STAMP)  ## the slow ones too
	JAX_PLATFORMS=cpu $(PY) -m pytest -n 2 --dist worksteal -m 'not compiled' $(ARGS)

# Their packages lie apart, because JAX looks for a GPU and a TPU where it finds them.
.plan: $(STAMP)
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --target .plan -c constraints.txt \
	    jax-cuda13-pjrt jax-cuda13-plugin libtpu

test-compiled: $(STAMP) .plan  ## programs compiled for GPUs and TPUs that are not here
	JAX_PLATFORMS=cpu PYTHONPATH=.plan TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
	    $(PY) -m pytest -n 2 --dist worksteal -m compiled $(ARGS)

test-gpu: export JAX_PLATFORMS := cuda,cpu
test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE := false
test-gpu: $(STAMP)  ## the tests on the GPU; first, in under 5 minutes, what only a GPU can show
	$(PY) -m pytest -m gpu_first $(ARGS) || test $$? -eq 5  # 5: ARGS choose none of these
	$(PY) -m pytest -m 'not slow and not gpu_first and not compiled' $(ARGS)

lint: $(STAMP)  ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: $(STAMP)  ## ruff, writing
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: $(STAMP)  ## the benchmarks; results go to benchmarks/results/
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(PY) $$file $(ARGS) || exit 1; done

# A machine lent for minutes, without network, installs nothing: its own Python runs the benchmark.
BENCH_PY := $(if $(wildcard $(PY)),$(PY),python3)
MINUTES ?= 9

bench-gpu:  ## speed on this GPU: make bench-gpu [MINUTES=9] [PART=n] [TOY=1]
	@$(BENCH_PY) -m benchmarks.gpu --minutes $(MINUTES) $(PART:%=--part %) $(if $(TOY),--toy) $(ARGS)

bench-report:  ## docs/benchmarks.md from the results: make bench-report [TOY=1]
	@$(BENCH_PY) -m benchmarks.gpu.report $(if $(TOY),--toy) $(ARGS)

clean:  ## remove caches and build products, not runs/ and not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
