"""What an exit code leads to, as a shell function: for supervisors that are shell scripts."""

from emu3_jax import exit_codes
from launch import spec

# Asks again and again, as bash may lose the exit code where a signal comes while it waits.
FUNCTION = """\
# Until the process $1 has ended; returns where it is to be started again.
follow() {{
  while kill -0 "$1" 2> /dev/null; do
    sleep 1
  done
  wait "$1"
  code=$?
  again="starting again (not counted)"
  case $code in
    {done})
      echo "all steps are done"
      exit 0 ;;
    {fatal})
      echo "ended with $code; another attempt would end the same"
      exit "$code" ;;
    {uncounted}) ;;
    *)
      echo "$(date -Is) code $code" >> "$failures"
      counted=$(wc -l < "$failures")
      if [ "$counted" -gt {max_restarts} ]; then
        echo "ended with $code; all {max_restarts} restarts are used up, see $failures"
        exit "$code"
      fi
      again="starting again ($counted of {max_restarts} counted)" ;;
  esac
}}
"""


def follow(job: spec.Job) -> str:
    """The function `follow`, which sets `code` and `again`, what is to be said of it.

    Failures that count get a line each in the file `failures`.
    """
    return FUNCTION.format(
        done=exit_codes.DONE,
        fatal=" | ".join(map(str, exit_codes.FATAL)),
        uncounted=" | ".join(map(str, exit_codes.UNCOUNTED)),
        max_restarts=job.restart.max_restarts,
    )
