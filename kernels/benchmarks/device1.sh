export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:kernels:. FLASHINFER_WORKSPACE_BASE=/tmp/fi FLASHINFER_CUDA_ARCH_LIST=9.0a
(time python3 kernels/benchmarks/flashinfer_build.py) > $OUT/fi.log 2>&1 &
FI=$!
(time timeout 200 python3 -m pytest tests/kernels/test_triton_mac.py tests/kernels/test_attend.py tests/kernels/test_match.py -n 8 -q --tb=short -p no:cacheprovider) > $OUT/pytest.log 2>&1
tail -30 $OUT/pytest.log
timeout 200 python3 kernels/benchmarks/sweep.py full mac parts 2>&1 | tee $OUT/sweep.log
wait $FI; tail -12 $OUT/fi.log
(cd /tmp/fi && find . -name '*.so' | tar czf $OUT/fi.tgz -T - ; ls -la $OUT; find . | grep -v '\.o$' | head -30)
