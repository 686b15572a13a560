# `mra-export serve` on a CPU, with ONNX Runtime and without torch.
#   docker build -f examples/deploy/cpu.Dockerfile -t mra-serve:cpu .
#   docker run --rm -p 127.0.0.1:8080:8080 -v "$PWD/bundle:/bundle:ro" mra-serve:cpu
FROM python:3.12-slim-bookworm AS builder
# The distribution pins its own packages; the compiler never reaches the image below.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mra_export mra_export
# The wheel holds the compiled op libraries.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY examples/deploy/requirements-serve.txt /tmp/
COPY --from=builder /wheels /wheels
RUN pip install --no-cache-dir -r /tmp/requirements-serve.txt && pip install --no-cache-dir --no-deps /wheels/*.whl
USER 65532:65532
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=4)"]
ENTRYPOINT ["mra-export", "serve"]
CMD ["/bundle", "--host", "0.0.0.0", "--port", "8080", "--name", "mra"]
