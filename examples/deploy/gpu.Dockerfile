# `mra-export serve` on an NVIDIA GPU: TensorRT engines, and torch with our CUDA kernel.
#   docker build -f examples/deploy/gpu.Dockerfile -t mra-serve:gpu .
#   docker run --rm --gpus all -p 127.0.0.1:8080:8080 -v "$PWD/bundle:/bundle:ro" mra-serve:gpu
# An engine runs on the TensorRT that built it: install that release with --build-arg TENSORRT=10.14.1.48.post1, for one.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS builder
# The distribution pins its own packages; the compiler never reaches the image below.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-pip python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mra_export mra_export
# The wheel holds the compiled op libraries, with the CUDA kernel, and the TensorRT plugin.
RUN python3 mra_export/plugins/tensorrt/fetch_headers.py && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
ARG TENSORRT=10.14.1.48.post1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
COPY --from=builder /wheels /wheels
ENV PATH=/opt/mra/bin:$PATH
RUN python3 -m venv /opt/mra && \
  pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/*.whl)[serve]" "tensorrt==$TENSORRT"
USER 65532:65532
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=4)"]
ENTRYPOINT ["mra-export", "serve"]
CMD ["/bundle", "--host", "0.0.0.0", "--port", "8080", "--name", "mra", "--backend", "tensorrt"]
