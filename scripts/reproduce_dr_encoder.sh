#!/usr/bin/env bash
# DR-Encoder (AAAI-25, arXiv 2412.17053): as published, corrected with the paper's encoder, with the encoder that wins here, and without one.
source "$(dirname "$0")/reproduce_common.sh"

runs_of() {
    # A small clip norm for the two that are ours; which one the paper has is not published.
    local clip=() code=(codec.family=kronecker federation.server.space=code)
    sized configs/classify_chain.yaml seed=1 "${newswire[@]}" federation.expected_cohort=50 federation.rounds=20 federation.server.lr=1e-2
    if [ "$size" = default ]; then
        clip=(privacy.clip.norm=0.1)
        code+=(codec.code_size=1164)
    fi
    run no-privacy method=fedit
    run published method=dr_encoder:published codec.fit_at=server
    run corrected-autoencoder codec.family=autoencoder codec.code_size=null codec.prior=moments codec.fit_at=server
    [ "$size" = full ] || run corrected-kronecker "${code[@]}" ${clip[@]+"${clip[@]}"}
    run no-encoder method=full_noise codec.refresh=3 ${clip[@]+"${clip[@]}"}
}
each runs_of llama-7b qwen-7b
