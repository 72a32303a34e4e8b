#!/usr/bin/env bash
# configs/gpu/wheels.sh [FOLDER]      packs the needs of first.sh for a machine with a GPU and no network: FOLDER/site.tar.xz (default runs/wheels)
# For x86-64 and Python 3.12, in addition to installed torch, transformers, accelerate, einops, safetensors and numpy. Wheels are deflated,
# and OpenCV's alone has 55 MB: unpacked and compressed together with xz, they and the sources stay below 60 MB (takes a minute or more).
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-runs/wheels}
packages=(diffusers==0.42.1 requests urllib3 charset-normalizer importlib-metadata zipp)  # diffusers refuses to start without the last five
packages+=(omegaconf opencv-python-headless pillow pytest pytest-timeout pluggy iniconfig)  # the rest comes with transformers and accelerate
[ -z "${PACKAGES:-}" ] || read -ra packages <<<"$PACKAGES"  # fewer, for a machine that has some of these
mkdir -p "$folder/download"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/download" --python-version 3.12 \
  --implementation cp --abi cp312 --abi abi3 --abi none --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 "${packages[@]}"
rm -rf "$folder/site"
mkdir "$folder/site"
for wheel in "$folder"/download/*.whl; do
  "${PYTHON:-python3}" -m zipfile -e "$wheel" "$folder/site"
done
tar -C "$folder/site" -c . | xz -6 -T0 >"$folder/site.tar.xz"
rm -rf "$folder/site"
tree=$(git archive HEAD -- . ':!docs' ':!kling/assets/transformer*' | wc -c)
packed=$(stat -c %s "$folder/site.tar.xz")
echo "$folder/site.tar.xz $((packed / 1000000)) MB, the tree without docs and kling/assets/transformer* $((tree / 1000000)) MB"
((packed + tree < 60000000)) || { echo "together more than 60 MB: leave packages out" >&2; exit 1; }
