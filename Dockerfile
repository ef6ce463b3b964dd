# dash-serve with a bundle that is mounted, read-only, at /bundle:
#   docker build -t dash-onnx .
#   docker run --rm -p 8000:8000 -v "$PWD/out:/bundle:ro" -v "$PWD/key.txt:/key:ro" \
#     --read-only --tmpfs /tmp dash-onnx
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dash_onnx dash_onnx
COPY exporters exporters
COPY runtime runtime
RUN python -m venv /app && /app/bin/pip install --no-cache-dir '.[cpu,serve]'

FROM python:3.12-slim
COPY --from=build /app /app
RUN useradd --system --uid 10001 dash
USER 10001
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=30s CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health')"]
# SIGTERM lets running answers end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["dash-serve", "/bundle", "--host", "0.0.0.0", "--api-key-file", "/key"]
