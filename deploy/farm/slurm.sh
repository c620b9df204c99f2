#!/bin/bash
# One clip as a Slurm array, a shard a task; see README.md beside this file.
#SBATCH --job-name=mst-gan
#SBATCH --array=1-8
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --requeue
# A task that was preempted or whose node died is queued again, and goes on from its finished segments.
set -euo pipefail
in=$1 out=$2
shift 2
exec mst-gan-upscale "$in" "$out" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
