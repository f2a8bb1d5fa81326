# Training: everything from a folder of good frames to a bundle. An ordinary user; frames, store and runs are volumes.
# 1.5 GB over its base with torch for CPUs.
#
#   docker build -f docker/training.Dockerfile -t flawline/training:0.1.0 .                          # CPU
#   docker build -f docker/training.Dockerfile --build-arg TORCH_INDEX= -t flawline/training:0.1.0 . # CUDA, several GB
#   docker run --read-only --tmpfs /tmp -v "$PWD/lines:/frames:ro" -v "$PWD/store:/store" --user "$(id -u)" \
#       flawline/training:0.1.0 train /frames/cap --store /store --runs /store/.runs
#   docker run --gpus all --shm-size 4g --read-only --tmpfs /tmp -v … --entrypoint torchrun flawline/training:0.1.0 \
#       --standalone --nproc-per-node=gpu --no-python flawline train /frames/cap …    # all GPUs together; not run
#   docker build -f docker/training.Dockerfile --target sbom -o . .   # writes sbom.cdx.json (CycloneDX)

# checkov:skip=CKV_DOCKER_7:the base has a version, in this argument, which checkov does not follow
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
# Where torch comes from. The wheels of this index are built for CPUs; those of PyPI (an empty argument) bring CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Or a folder of wheels that is mounted into the build, where no index is within reach.
ARG PIP_FIND_LINKS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/flawline
WORKDIR /src
# Dependencies first: they change seldom, and their layer is kept when only the sources change.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; \
print('\n'.join(p['dependencies'] + e['service'] + e['training'] + e['client']))" > wanted.txt \
    && /opt/flawline/bin/pip install --quiet ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt -r wanted.txt
COPY README.md LICENSE ./
COPY service service
COPY models models
COPY training training
RUN /opt/flawline/bin/pip install --quiet -c constraints.txt hatchling \
    && /opt/flawline/bin/pip install --quiet --no-deps --no-build-isolation . \
    && /opt/flawline/bin/pip uninstall --quiet --yes hatchling pathspec pluggy trove-classifiers \
    && /opt/flawline/bin/pip uninstall --quiet --yes pip

FROM build AS inventory
RUN python -m venv /opt/tools \
    && /opt/tools/bin/pip install --quiet 'cyclonedx-bom==7.5.0' \
    && /opt/tools/bin/cyclonedx-py environment /opt/flawline/bin/python --output-file /sbom.cdx.json

FROM scratch AS sbom
COPY --from=inventory /sbom.cdx.json /

FROM ${PYTHON} AS training
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Flawline training" \
      org.opencontainers.image.description="Fits, evaluates, calibrates and exports detectors of defects nobody has seen" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Whoever mounts an empty volume here may write to it.
RUN install -d -o 10001 -g 10001 /frames /store
COPY --from=build /opt/flawline /opt/flawline
# Libraries that keep caches at home find one that can be written to.
ENV PATH=/opt/flawline/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
# A run is no server: it ends, and its exit code says how.
HEALTHCHECK NONE
ENTRYPOINT ["flawline"]
CMD ["train", "--help"]
