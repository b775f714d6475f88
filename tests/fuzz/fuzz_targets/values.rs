//! Messages become values and messages again: the value that was taken is the value that is told.
#![no_main]

use berth_proto::convert::*;
use berth_proto::values::{AssignmentBody, DeploymentSpec};
use berth_proto::{agent, api};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn read<M: Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).unwrap_or_default()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 6 {
        0 => {
            let written: api::DeploymentSpec = read(bytes);
            let _ = deployment_spec_to_write(&written);
            if let Ok(spec) = deployment_spec_from_api(&written) {
                let told = deployment_spec_to_api(&spec);
                assert_eq!(deployment_spec_from_api(&told).ok().as_ref(), Some(&spec));
            }
        }
        1 => {
            if let Ok(source) = resolved_from_api(&read(bytes)) {
                assert_eq!(resolved_from_api(&resolved_to_api(&source)).ok(), Some(source));
            }
        }
        2 => {
            if let Ok(body) = assignment_body_from_bytes(bytes) {
                let told: agent::AssignmentBody = assignment_body_to_agent(&body);
                let read = assignment_body_from_bytes(&told.encode_to_vec());
                let read = read.expect("what is told is read");
                // All but what only the server needs.
                assert_eq!(read.spec.rollout.ready_for_ms, body.spec.rollout.ready_for_ms);
                let spec = DeploymentSpec {
                    scale: read.spec.scale,
                    placement: read.spec.placement.clone(),
                    rollout: read.spec.rollout,
                    ..body.spec.clone()
                };
                assert_eq!(read, AssignmentBody { spec, ..body });
                let again = assignment_body_to_agent(&read).encode_to_vec();
                assert_eq!(assignment_body_from_bytes(&again).ok(), Some(read));
            }
        }
        3 => {
            let facts = host_facts_from_api(&read(bytes));
            assert_eq!(host_facts_from_api(&host_facts_to_api(&facts)), facts);
        }
        4 => {
            let status = replica_status_from_api(&read(bytes));
            assert_eq!(replica_status_from_api(&replica_status_to_api(&status)), status);
        }
        _ => {
            let exit = exit_from_api(&read(bytes));
            assert_eq!(exit_from_api(&exit_to_api(&exit)), exit);
        }
    }
});
