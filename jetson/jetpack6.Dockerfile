# edgert for JetPack 6.1 and 6.2 (L4T r36.4): Python 3.10, CUDA 12.6, TensorRT 10.3.
#   docker build -f jetson/jetpack6.Dockerfile -t edgert:jetpack6 .        on the board, from the clone
#   docker run --rm --runtime nvidia -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro \
#       -v "$PWD/bundles:/bundles" -v edgert-cache:/cache edgert:jetpack6 doctor
# NOT BUILT YET: neither the base image nor this file has been tried on a board.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

COPY . /opt/edgert/source
# The base has TensorRT with its Python module.
RUN /opt/edgert/source/jetson/setup.sh --jetpack 6 --venv /opt/edgert/venv \
    && rm -rf /var/lib/apt/lists/*

ENV EDGERT_CACHE_DIR=/cache
VOLUME /cache
ENTRYPOINT ["/opt/edgert/venv/bin/edgert"]
CMD ["doctor"]
