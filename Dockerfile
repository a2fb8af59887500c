# Two images; neither needs a shell, root, or a root file system that it can write to.
#
#   docker build --target init --tag streamload:0.1.0 .           stage and serve: without torch
#   docker build --target loader --tag streamload-loader:0.1.0 .  every command, with torch
#
# `make image-test` builds `init` and runs it as a kubelet would; constraints.txt holds for its Python.

ARG BASE=python:3.11-slim-bookworm


FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# pip works from outside: the environment that goes into the image has none.
RUN python -m venv --without-pip /opt/streamload
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE streamload_command.py ./
COPY streamload streamload


FROM build AS init-build
RUN python -m pip --python /opt/streamload/bin/python install --constraint constraints.txt '.[hub]'
COPY scripts/slim_botocore.py ./
RUN /opt/streamload/bin/python slim_botocore.py


FROM build AS loader-build
RUN python -m pip --python /opt/streamload/bin/python install --constraint constraints.txt '.[torch,hub,runai,gs,az]'


FROM ${BASE} AS base
RUN useradd --uid 1000 --create-home streamload
ENV PATH=/opt/streamload/bin:$PATH
USER 1000:1000
WORKDIR /home/streamload


# The arguments of KServe's storage initializer are what follows.
FROM base AS init
COPY --from=init-build /opt/streamload /opt/streamload
ENTRYPOINT ["streamload", "stage"]


FROM base AS loader
COPY --from=loader-build /opt/streamload /opt/streamload
ENTRYPOINT ["streamload"]
CMD ["--help"]
