# fedkern for CPUs. The build argument TORCH_INDEX, PyTorch's index of CPU builds, makes the image gigabytes smaller.
#   docker build --tag fedkern .
#   docker run --rm --volume "$PWD/runs:/runs" fedkern fedavg --out first
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=""
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fedkern
ENV PATH="/opt/fedkern/bin:$PATH" PIP_NO_CACHE_DIR=1
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY . /src
RUN FEDKERN_ISA=all FEDKERN_CUDA=0 pip install /src

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home fedkern && install --directory --owner=fedkern /runs
COPY --from=build /opt/fedkern /opt/fedkern
ENV PATH="/opt/fedkern/bin:$PATH"
USER fedkern
WORKDIR /runs
ENTRYPOINT ["fedkern"]
CMD ["--help"]
