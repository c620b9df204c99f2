#!/usr/bin/env bash
# Base images from Debian's packages, for where no registry can be reached; needs root and debootstrap.
#   deploy/debian-images.sh && BASE_IMAGE=mst-gan-base:bookworm NGINX_IMAGE=mst-gan-tools:bookworm \
#       PROMETHEUS_IMAGE=mst-gan-tools:bookworm make test-deploy
set -euo pipefail
make_image() {  # TAG PACKAGES [CHANGE...]
    local folder
    folder=$(mktemp -d)
    debootstrap --variant=minbase --include="$2" bookworm "$folder" http://deb.debian.org/debian > /dev/null
    rm -rf "$folder"/var/{cache/apt,lib/apt/lists}/* "$folder"/usr/share/{doc,info,locale,man}
    [[ -z ${3:-} ]] || chroot "$folder" bash -c "$3"
    tar -C "$folder" -c . | docker import --change 'CMD ["bash"]' - "$1"
    rm -rf "$folder"
}
make_image mst-gan-base:bookworm python3.11-minimal,libpython3.11,ca-certificates
make_image mst-gan-tools:bookworm nginx-light,prometheus 'mkdir /prometheus && chown 65534:65534 /prometheus'
