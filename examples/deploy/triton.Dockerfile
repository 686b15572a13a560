# Triton with mra_export in its Python, for what `mra-export triton --backend python` and `--tokenizer` write.
#   docker build -f examples/deploy/triton.Dockerfile -t mra-triton .
#   docker run --rm --shm-size=1g -p 8000:8000 -p 8001:8001 -v "$PWD/repository:/models:ro" mra-triton
FROM nvcr.io/nvidia/tritonserver:25.08-py3 AS builder
# The distribution pins its own packages.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-pip && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mra_export mra_export
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/tritonserver:25.08-py3
# The server's own Python is the one that its python backend runs.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
COPY examples/deploy/requirements-serve.txt /tmp/
COPY --from=builder /wheels /wheels
RUN pip install --no-cache-dir -r /tmp/requirements-serve.txt && pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
CMD ["tritonserver", "--model-repository=/models"]
