# The GPU service: CUDA's runtime libraries, onnxruntime-gpu and TensorRT; no compiler, no torch, an ordinary user, and
# nothing that it writes to. Wants a driver for CUDA 13 (R580 or newer) and the NVIDIA container toolkit on the host.
#
#   docker build -f docker/gpu.Dockerfile -t flawline/service-gpu:0.1.0 .
#   docker run --gpus all --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       -p 8000:8000 -v "$PWD/store:/store:ro" flawline/service-gpu:0.1.0
#   docker build -f docker/gpu.Dockerfile --target sbom -o . .    # writes sbom.cdx.json (CycloneDX)
#
# Linted by a test, and its packages resolved (not TensorRT's, whose libraries come from another index); never built or
# run, because no registry that has its base was at hand.

# checkov:skip=CKV_DOCKER_7:the base has a version, in this argument, which checkov does not follow
ARG CUDA=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

FROM ${CUDA} AS python
# Not pinned: the archive of a release keeps only the newest of each package, and an old pin is a build that fails.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

FROM python AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/flawline
# Extras of pyproject.toml, beside `gpu`; `signing` is for signed bundles.
ARG EXTRAS="tracing s3"
WORKDIR /src
# Dependencies first: they change seldom, and their layer is kept when only the sources change.
COPY constraints.txt docker/constraints-gpu.txt pyproject.toml ./
RUN python3 -c "import os, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
e = [one for name in ['gpu', *os.environ['EXTRAS'].split()] for one in p['optional-dependencies'][name]]; \
print('\n'.join(p['dependencies'] + e))" > wanted.txt \
    && /opt/flawline/bin/pip install --quiet -c constraints.txt -c constraints-gpu.txt -r wanted.txt
COPY README.md LICENSE ./
COPY service service
COPY models models
COPY training training
# The same pins build the wheel; pip itself is of no use at run time, and whoever breaks in should not find it.
RUN /opt/flawline/bin/pip install --quiet -c constraints.txt hatchling \
    && /opt/flawline/bin/pip install --quiet --no-deps --no-build-isolation . \
    && /opt/flawline/bin/pip uninstall --quiet --yes hatchling pathspec pluggy trove-classifiers \
    && /opt/flawline/bin/python -m compileall -q /opt/flawline/lib \
    && /opt/flawline/bin/pip uninstall --quiet --yes pip

FROM build AS inventory
RUN python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --quiet 'cyclonedx-bom==7.5.0' \
    && /opt/tools/bin/cyclonedx-py environment /opt/flawline/bin/python --output-file /sbom.cdx.json

FROM scratch AS sbom
COPY --from=inventory /sbom.cdx.json /

FROM python AS service
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Flawline" \
      org.opencontainers.image.description="Finds defects nobody has seen before; GPU service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/flawline /opt/flawline
ENV PATH=/opt/flawline/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    CUDA_CACHE_PATH=/tmp/cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    FLAWLINE_DEVICE=cuda \
    FLAWLINE_HOST=0.0.0.0 \
    FLAWLINE_STORE_DIRECTORY=/store
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: a container that loads its bundles is healthy, and restarting it would only make it load again.
# FLAWLINE_HEALTH_PORT is asked where there is one: with TLS or keys the port of the frames has no answer for it.
# Set another port as FLAWLINE_PORT: of `serve --port` this check hears nothing, and calls the container unhealthy.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; port = os.environ.get('FLAWLINE_HEALTH_PORT') or \
os.environ.get('FLAWLINE_PORT', '8000'); r.urlopen(f'http://127.0.0.1:{port}/healthz/live', timeout=5)"]
# Ours instead of the base's, which prints a banner.
ENTRYPOINT ["flawline"]
CMD ["serve"]
