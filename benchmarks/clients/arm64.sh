#!/usr/bin/env bash
# Fills FOLDER with a Python for arm64 and the runtime's wheels, to run under qemu-aarch64-static.
#   benchmarks/clients/arm64.sh FOLDER [ONNXRUNTIME-VERSION]
# Needs Debian (apt-get, dpkg), pip and the package qemu-user-static. Nothing is installed outside FOLDER.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
onnxruntime=${2:-1.32.0}
packages="libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libcrypt1 libuuid1
  python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"

state=$folder/apt
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$folder/root" "$folder/wheels"
touch "$state/status"
options=(-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State=$state" -o "Dir::State::status=$state/status"
  -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update -qq
# shellcheck disable=SC2086 (a list of names)
(cd "$state/cache/archives" && apt-get "${options[@]}" download -qq $packages)
for package in "$state"/cache/archives/*.deb; do dpkg -x "$package" "$folder/root"; done

python3 -m pip download -q -d "$folder/wheels" --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --python-version 311 --only-binary :all: --no-deps \
  "onnxruntime==$onnxruntime" numpy tokenizers
mkdir -p "$folder/site"
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/site"; done
# qemu shows the machine's own /proc/cpuinfo, and ONNX Runtime for arm64 crashes on one of x86: here is a Neoverse-N1's.
mkdir -p "$folder/root/proc"
for core in $(seq 0 $(($(nproc) - 1))); do
  printf 'processor\t: %d\nBogoMIPS\t: 100.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$core" \
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
  printf 'CPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
done >"$folder/root/proc/cpuinfo"
echo "PYTHONHOME=$folder/root/usr PYTHONPATH=$folder/site qemu-aarch64-static -L $folder/root $folder/root/usr/bin/python3.11"
