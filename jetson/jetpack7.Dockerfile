# edgert for JetPack 7.2 (L4T r39.2): Python 3.12, CUDA 13.2, TensorRT 10.16.
#   docker build -f jetson/jetpack7.Dockerfile -t edgert:jetpack7 .        on the board, from the clone
#   docker run --rm --runtime nvidia -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro \
#       -v "$PWD/bundles:/bundles" -v edgert-cache:/cache edgert:jetpack7 doctor
# There is no l4t-jetpack image for L4T r39; CUDA's own image, which is for all Arm servers, takes
# its place, and TensorRT comes from the source of packages that it brings.
# NOT BUILT YET: neither the base image nor this file has been tried on a board.
FROM nvcr.io/nvidia/cuda:13.2.1-runtime-ubuntu24.04

# That of JetPack 7.2: an engine built by another version does not load.
ARG TENSORRT=10.16.2.10-1+cuda13.2

COPY . /opt/edgert/source
RUN /opt/edgert/source/jetson/setup.sh --jetpack 7 --venv /opt/edgert/venv --tensorrt "$TENSORRT" \
    && rm -rf /var/lib/apt/lists/*

ENV EDGERT_CACHE_DIR=/cache
VOLUME /cache
ENTRYPOINT ["/opt/edgert/venv/bin/edgert"]
CMD ["doctor"]
