# Call 1: two GPUs. Lane 0: kernels of scratch/kernel4. Lane 1: GPU tests of the attention kernels. Then the exchange on both.
T0=$SECONDS; export HF_HUB_OFFLINE=1
mark() { echo "== $((SECONDS-T0)) s: $*"; }
(export CUDA_VISIBLE_DEVICES=0; LIMIT=${LIMIT:-170} bash scratch/kernel4/run.sh > $OUT/kernel4.txt 2>&1; grep "^|\|load\|build\|fails" $OUT/kernel4.txt || tail -15 $OUT/kernel4.txt; mark kernel4) &
L0=$!
(export CUDA_VISIBLE_DEVICES=1
 OMP_NUM_THREADS=1 timeout 160 python3 -m pytest -q -m gpu -n 8 --dist=worksteal -p no:cacheprovider -rfE packages/svg-kernels/tests/test_attention_fp8_gpu.py packages/svg-kernels/tests/test_attention_gpu.py > $OUT/tests.txt 2>&1; tail -14 $OUT/tests.txt | cut -c1-220; mark tests) &
L1=$!; wait $L0 $L1; mark lanes
COMMIT=$C bash scratch/gpus_again.sh 2>&1 | tail -60 | cut -c1-260; mark gpus
cd $OUT; tar czf all.tgz --exclude=all.tgz .; find . -type f ! -name all.tgz -delete; find . -type d -empty -delete
