# fedkern for CPUs. PyTorch's index of CPU builds makes the image gigabytes smaller:
# add --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu.
#   docker build --build-arg COMMIT="$(git describe --always --dirty --match=)" --tag fedkern .
#   mkdir -p runs && docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/runs:/runs" fedkern fedgid --out first
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=""
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fedkern
ENV PATH="/opt/fedkern/bin:$PATH" PIP_NO_CACHE_DIR=1
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
ARG COMMIT=""
COPY . /src
RUN echo "$COMMIT" > /src/fedkern/commit.txt && FEDKERN_ISA=all FEDKERN_CUDA=0 pip install /src

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && install --directory --mode=1777 /runs /home/fedkern
COPY --from=build /opt/fedkern /opt/fedkern
# Any user may run it: runs go to /runs, caches to the home folder.
ENV PATH="/opt/fedkern/bin:$PATH" HOME=/home/fedkern
USER 10001
WORKDIR /runs
ENTRYPOINT ["fedkern"]
CMD ["--help"]
