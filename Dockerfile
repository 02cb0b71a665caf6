# molora serve in a container, as a user without rights:
#   docker build --target cpu --tag molora .
#   docker build --target cuda --tag molora:cuda .

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim AS common
RUN useradd --create-home --uid 10001 molora
COPY --from=wheel /wheels /wheels
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
# What is listened on inside; who reaches it is up to how the container's port is published.
ENTRYPOINT ["molora", "serve", "/model", "--host", "0.0.0.0"]
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]

# torch for CPUs has its own index, and no libraries of CUDA; what is there is not installed again.
FROM common AS cpu
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_WHEELS" "torch>=2.11,<2.15" "torchvision>=0.26,<0.30" "torchaudio==2.11.0" \
    && pip install --no-cache-dir "$(echo /wheels/molora-*.whl)[audio,serve]"
USER 10001

# torch as it is published brings CUDA's libraries; the host has the driver and NVIDIA's container toolkit.
FROM common AS cuda
RUN pip install --no-cache-dir "$(echo /wheels/molora-*.whl)[audio,serve]"
USER 10001
