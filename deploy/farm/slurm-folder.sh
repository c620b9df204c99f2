#!/bin/bash
# A folder of films as a Slurm array of like workers; see README.md beside this file.
#SBATCH --job-name=mst-gan-films
#SBATCH --array=1-8
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --requeue
set -euo pipefail
exec mst-gan-upscale "$@"
