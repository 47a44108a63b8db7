# One image for CPU and GPU nodes: PyPI's torch brings its CUDA libraries; TORCH_INDEX names another index, for example
# the one with CPU builds, which are several GB smaller:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t unisono:cpu .
#   docker build -t unisono:cuda .
# EXTRAS chooses what is installed beside the server; add `ray` for members on other nodes.
# Models and matrices live in the volume /data, see docker/README.md.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
ARG EXTRAS="cpu,demo,lora,otel"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/unisono
ENV PATH=/opt/unisono/bin:$PATH
COPY constraints.txt ./
# Alone, since it is by far the largest and changes least.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY pyproject.toml README.md ./
COPY ensemble_core ensemble_core
COPY server server
RUN pip install -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim
LABEL org.opencontainers.image.title="Unisono" \
      org.opencontainers.image.description="Several language models answer as one, behind OpenAI's API"
# What the server writes: models, matrices, compiled loops. Everything else may be read-only.
ENV PATH=/opt/unisono/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    UNISONO_HOME=/data/home \
    NUMBA_CACHE_DIR=/data/compiled
COPY --from=build /opt/unisono /opt/unisono
COPY configs/container.yaml /etc/unisono/config.yaml
RUN useradd --uid 10001 --no-create-home --home-dir /data unisono \
    && install -d -o 10001 -g 10001 /data
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["unisono"]
CMD ["serve", "--config", "/etc/unisono/config.yaml"]
