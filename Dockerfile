# syntax=docker/dockerfile:1
# Everything but the examples and the development tools, on Debian's own Python; docs/containers.md has how it is run and built.
#   docker build -t largescale .
# Behind a proxy that has a certificate of its own, or with a mirror of PyPI:
#   docker build -t largescale --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt --build-arg INDEX=https://... .
ARG BASE=debian:trixie-slim
FROM ${BASE}

# make and python3-venv for a clone that is mounted (its commands make a .venv of their own), the compiler and Python's headers for torch.compile.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# The packages, from the lock alone: a change of the code installs nothing anew. CUDA comes with torch.
ARG INDEX=https://pypi.org/simple
COPY pyproject.toml requirements.lock /largescale/
RUN --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache \
    set -eu; cd /largescale; \
    if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi; \
    python3 -m venv /opt/venv; \
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock > /tmp/uv.txt; \
    /opt/venv/bin/pip install --disable-pip-version-check --index-url "$INDEX" --require-hashes -r /tmp/uv.txt; \
    /opt/venv/bin/uv pip install --python /opt/venv/bin/python --default-index "$INDEX" --link-mode copy \
        --compile-bytecode --require-hashes --constraints requirements.lock --requirements pyproject.toml \
        --extra train --extra demo --extra demo-text --extra prep --extra hub --extra eval; \
    rm /tmp/uv.txt

# Found from every folder; where a clone is mounted and is the working directory, its code comes first.
COPY . /largescale
RUN echo /largescale > "$(echo /opt/venv/lib/python3*/site-packages)/largescale.pth" \
 && /opt/venv/bin/python -m compileall -q /largescale

# NVIDIA_*: what NVIDIA's runtime, and enroot, make visible; Apptainer does so with --nv.
ENV PATH=/opt/venv/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /largescale
ENTRYPOINT ["/largescale/entrypoint.sh"]
CMD ["python", "-m", "largescale.train", "--help"]
