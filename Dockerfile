# docker build -t instep .                            torch with CUDA, from PyPI
# docker build -t instep --build-arg TORCH=cpu .      the CPU build of torch
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY deploy/setup deploy/setup
# The dependencies are a layer of their own, so that a change in app/ does not download torch again.
RUN mkdir app && touch app/__init__.py && deploy/setup /venv . && rm /venv/setup.log
COPY app app
RUN pip install --no-deps --force-reinstall .

FROM python:${PYTHON}-slim
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Instep" \
      org.opencontainers.image.description="An HTTP inference server for image diffusion models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
RUN useradd --uid 10001 --create-home instep && install -d -o instep /home/instep/.cache
COPY --from=build /venv /venv
COPY models /srv/models
ENV PATH=/venv/bin:$PATH HOME=/home/instep PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 INSTEP_HOST=0.0.0.0 INSTEP_PORT=8000
WORKDIR /srv
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import os, urllib.request as u; p = os.environ.get('INSTEP_PORT', ''); u.build_opener(u.ProxyHandler({})).open(f'http://127.0.0.1:{p if p.isdigit() else 8000}/readyz', timeout=4)"]
# The server itself must get the signal, so that it can drain; there is no shell in between.
STOPSIGNAL SIGTERM
CMD ["instep", "serve"]
