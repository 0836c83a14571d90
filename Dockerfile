# The server of nano: docker build -t pixeldecoder . && docker run -p 8000:8000 pixeldecoder
# With CUDA: docker build --build-arg TORCH=cu130 -t pixeldecoder . && docker run --gpus all -p 8000:8000 pixeldecoder
FROM python:3.11-slim

ARG TORCH=cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" --index-url https://download.pytorch.org/whl/${TORCH}
COPY src src
RUN sed -i '/^torch==/d' constraints.txt \
    && pip install --no-cache-dir --constraint constraints.txt '.[serve]' \
    && useradd --create-home --uid 1000 decoder

USER 1000
ENV HF_HOME=/home/decoder/hub
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
# Within the container at every address; which of them others reach, `docker run -p` says.
CMD ["pixeldecoder", "serve", "--host", "0.0.0.0", "--port", "8000"]
