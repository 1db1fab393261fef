# syntax=docker/dockerfile:1
FROM python:3.12-slim AS build
# cuda: the torch of PyPI, which brings its CUDA libraries; cpu: the small build of PyTorch's own index.
ARG TORCH=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The dependencies are a layer of their own: a change in app/ does not fetch torch again.
RUN mkdir app && touch app/__init__.py \
    && if [ "$TORCH" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && pip install --constraint constraints.txt .
COPY app app
RUN pip install --no-deps --force-reinstall .

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home instep && install -d -o instep /home/instep/.cache
COPY --from=build /venv /venv
COPY models /srv/models
ENV PATH=/venv/bin:$PATH INSTEP_HOST=0.0.0.0 INSTEP_PORT=8000 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
WORKDIR /srv
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["instep", "serve"]
