# The image that jobs run in on Kubernetes (and wherever containers run):
#
#   docker build -t REGISTRY/mufasa_rec:TAG .                       CUDA
#   docker build -t REGISTRY/mufasa_rec:TAG --build-arg LOCK=cpu .  machines without a GPU
#
# A slim base is enough: torch's CUDA wheels bring CUDA, cuDNN and NCCL along; the nodes bring the driver (580 or newer for
# CUDA 13). What InfiniBand and EFA need beyond that lies in libibverbs here, and in the host's plugin (see docs/kubernetes.md).
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS packages
ARG LOCK=cuda
ARG TORCH_INDEX=
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The locks alone first: a change of code then costs no download of gigabytes.
COPY requirements/${LOCK}.txt /tmp/lock.txt
RUN pip install ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} --constraint /tmp/lock.txt torch==2.13.0 setuptools \
    && pip install --no-deps --requirement /tmp/lock.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY mufasa_rec mufasa_rec
COPY components components
COPY torchx_apps torchx_apps
RUN pip install --no-deps --no-build-isolation --no-index .

FROM python:${PYTHON}-slim
# libgomp: OpenMP of fbgemm; libibverbs and librdmacm: NCCL over InfiniBand or RoCE.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home mufasa
COPY --from=packages /opt/venv /opt/venv
# The NVIDIA runtime reads the two; without it they mean nothing.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# By number: a cluster that runs no root can tell that this is none.
USER 1000:1000
WORKDIR /home/mufasa
# Triton compiles its kernels here once per pod.
ENV TRITON_CACHE_DIR=/tmp/triton
