# syntax=docker/dockerfile:1
# docker build .                 the image for CPUs, the last stage
# docker build --target cuda .   for NVIDIA GPUs
# PIP_ARGS go to pip where it fetches torch. For CPUs give it PyTorch's index of CPU builds
# (--extra-index-url ...): without, torch brings several gigabytes of CUDA libraries.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
# Debian keeps only the newest version of a package, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt build hatchling
COPY . .
# The wheel carries the C kernels, for every instruction set.
RUN OFFRAMP_PREBUILT=1 python -m build --wheel --no-isolation --outdir /wheels

FROM python:${PYTHON}-slim AS cpu-packages
ARG PIP_ARGS=""
COPY constraints.txt /
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/offramp \
    && /opt/offramp/bin/pip install $PIP_ARGS -c constraints.txt "$(echo /wheels/*.whl)[fast,otel]"

FROM python:${PYTHON}-slim AS cuda-packages
ARG PIP_ARGS=""
COPY constraints.txt /
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/offramp \
    && /opt/offramp/bin/pip install $PIP_ARGS -c constraints.txt \
        "$(echo /wheels/*.whl)[fast,otel,gpu]"

FROM python:${PYTHON}-slim AS base
RUN useradd --create-home --uid 10001 offramp \
    && install --directory --owner=offramp --group=offramp /var/cache/offramp
COPY docker/healthcheck.py /opt/healthcheck.py
ENV PATH=/opt/offramp/bin:$PATH \
    OFFRAMP_CACHE_DIR=/var/cache/offramp \
    HF_HOME=/var/cache/offramp/hub
WORKDIR /home/offramp
# Weights, which the first start downloads and converts.
VOLUME /var/cache/offramp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m --retries=3 \
    CMD ["python", "/opt/healthcheck.py"]
# Flags win over the environment, so OFFRAMP_PORT and the like still work for all but the host.
ENTRYPOINT ["offramp", "serve", "--host", "0.0.0.0"]

FROM base AS cuda
# Triton compiles what launches its kernels, at the first start.
# Debian keeps only the newest version of a package, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda-packages /opt/offramp /opt/offramp
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/cache/offramp/triton
USER 10001:10001

FROM base AS cpu
COPY --from=cpu-packages /opt/offramp /opt/offramp
USER 10001:10001
