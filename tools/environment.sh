# Sourced by the tools: creates .venv once, and updates it when pyproject.toml changes.
# usage: environment EXTRA [FOLDER]     an extra of pyproject.toml or "", and another folder
#        gpu_extra                      prints the extra for this machine's driver: cu13, cu12 or ""

environment() {
    local extra=$1 folder=${2:-.venv} root python stamp wanted order
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || return 1
    order="python3.14 python3.13 python3.12 python3.11"
    # Numba compiles and simulates kernels under 3.11 (pyproject.toml).
    case $extra in build | dev | oracle) order="python3.11 $order" ;; esac
    for python in "${PYTHON:-}" $order python3; do
        [ -n "$python" ] && command -v "$python" >/dev/null || continue
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=
    done
    if [ -z "$python" ] && [ ! -x "$folder/bin/python" ]; then
        echo "Osmium needs Python 3.11 or newer; none is on PATH. Install one, or set PYTHON to it." >&2
        return 1
    fi
    stamp=$folder/osmium-$extra
    wanted=$(cksum < pyproject.toml)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x "$folder/bin/python" ]; then
            echo "Creating $folder with $("$python" --version) (a minute or two, once)" >&2
            local existed=$([ -e "$folder" ] && echo yes)
            "$python" -m venv "$folder" || {
                [ -n "$existed" ] || rm -rf "$folder"  # the next run would use an incomplete one
                echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
                return 1
            }
        else
            echo "Updating $folder (a minute or two, once)" >&2
        fi
        "$folder/bin/python" -m pip install --disable-pip-version-check \
            -e ".${extra:+[$extra]}" >&2 || return 1
        printf '%s\n' "$wanted" > "$stamp"
    fi
    PATH=$root/$folder/bin:$PATH
}

gpu_extra() {
    local smi driver
    for smi in nvidia-smi /usr/lib/wsl/lib/nvidia-smi; do
        driver=$("$smi" --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || continue
        [ "${driver%%.*}" -ge 580 ] 2>/dev/null && echo cu13 || echo cu12
        return
    done
}
