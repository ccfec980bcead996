# Sourced by tools/serve, tools/test and tools/check: makes .venv once, and again when pyproject.toml changes.
# usage: environment EXTRA     an extra of pyproject.toml, or an empty string

environment() {
    local extra=$1 root python stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || return 1
    for python in "${PYTHON:-}" python3.14 python3.13 python3.12 python3.11 python3; do
        [ -n "$python" ] && command -v "$python" >/dev/null || continue
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=
    done
    if [ -z "$python" ]; then
        echo "Osmium needs Python 3.11 or newer; none is on PATH. Install one, or set PYTHON to it." >&2
        return 1
    fi
    stamp=.venv/osmium-$extra
    wanted=$(cksum < pyproject.toml)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Setting up .venv with $("$python" --version) (a minute or two, once)" >&2
        if [ ! -x .venv/bin/python ]; then
            "$python" -m venv .venv || {
                echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
                return 1
            }
        fi
        .venv/bin/python -m pip install --disable-pip-version-check \
            -e ".${extra:+[$extra]}" >&2 || return 1
        printf '%s\n' "$wanted" > "$stamp"
    fi
    PATH=$root/.venv/bin:$PATH
}
