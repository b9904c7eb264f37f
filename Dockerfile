# Train on a CPU: `docker build -t cifar_flax . && docker run --rm --init cifar_flax` runs configs/quickstart.py.
FROM python:3.13-slim

RUN useradd --create-home --uid 1000 user && mkdir /runs && chown user:user /runs

# The packages have layers of their own, so that an edit of the code installs nothing but the code.
WORKDIR /build
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY cifar_flax cifar_flax
RUN pip install --no-cache-dir --no-deps .

# Runs are written to /runs/runs/NAME. To keep them: `--mount type=bind,source=DIR,target=/runs`, writable for user 1000.
USER user
WORKDIR /runs
ENTRYPOINT ["cifar-flax"]
CMD ["--config", "quickstart"]
