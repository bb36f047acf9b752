# lftpipe on a CPU base (the default) or a CUDA base: docs/howto/container.md has both commands.
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/lftpipe/bin:$PATH

# A CUDA base of Ubuntu has no Python.
RUN command -v python3 >/dev/null && python3 -m venv --help >/dev/null 2>&1 || \
    (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lftpipe ./lftpipe
RUN python3 -m venv /opt/lftpipe && \
    pip install --constraint constraints.txt --extra-index-url ${TORCH_INDEX} ".[gguf]"

WORKDIR /experiments
VOLUME /experiments/data
ENTRYPOINT ["lftpipe"]
CMD ["--help"]
