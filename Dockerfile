# syntax=docker/dockerfile:1
# CPU image: docker build --build-arg PIP_ARGS='--extra-index-url <PyTorch's index of CPU builds>' .
# Without it pip installs torch with its CUDA libraries: several gigabytes, and runs on GPUs.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG PIP_ARGS=""
WORKDIR /src
COPY . .
# The wheel carries the C kernels, for every instruction set.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/offramp \
    && pip install -c constraints.txt build hatchling \
    && OFFRAMP_PREBUILT=1 python -m build --wheel --no-isolation --outdir /wheels \
    && /opt/offramp/bin/pip install $PIP_ARGS -c constraints.txt "$(echo /wheels/*.whl)[fast]"

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 10001 offramp \
    && install --directory --owner=offramp /var/cache/offramp
COPY --from=build /opt/offramp /opt/offramp
COPY docker/healthcheck.py /opt/offramp/healthcheck.py
ENV PATH=/opt/offramp/bin:$PATH \
    OFFRAMP_CACHE_DIR=/var/cache/offramp \
    HF_HOME=/var/cache/offramp/hub
USER offramp
WORKDIR /home/offramp
VOLUME /var/cache/offramp
EXPOSE 8000
# The first start downloads and converts the model.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m --retries=3 \
    CMD ["python", "/opt/offramp/healthcheck.py"]
# Flags win over the environment, so OFFRAMP_PORT and the like still work for all but the host.
ENTRYPOINT ["offramp", "serve", "--host", "0.0.0.0"]
