//! The protocol over gRPC.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use berth_proto::inference as wire;
use tonic::{Code, Status};
use wire::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use wire::model_infer_request::InferInputTensor;
use wire::model_infer_response::InferOutputTensor;
use wire::model_metadata_response::TensorMetadata;

use crate::error::{Error, Outcome};
use crate::metrics::Protocol;
use crate::service::{Deadline, EXTENSIONS, PLATFORM, SERVER_NAME, Service};
use crate::signature::{Signature, TensorSpec};
use crate::tensor::{Datatype, Elements, InputError, Tensor};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

/// The routes of the inference service, of the standard health service and of reflection.
///
/// # Errors
///
/// When the descriptors that reflection serves are damaged, which is a fault of the build.
pub fn routes(
    service: Arc<Service>,
    health: tonic_health::server::HealthService,
) -> Result<Router, tonic_reflection::server::Error> {
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(berth_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("inference.GRPCInferenceService")
            .with_service_name("grpc.health.v1.Health")
    };
    let inference = GrpcInferenceServiceServer::new(Inference(service.clone()))
        .max_decoding_message_size(service.settings().max_body)
        // Answers are as large as the model makes them.
        .max_encoding_message_size(usize::MAX);
    let health = tonic_health::pb::health_server::HealthServer::new(health);
    Ok(Router::new()
        .route_service("/inference.GRPCInferenceService/{call}", inference)
        .layer(from_fn_with_state(service, guard))
        .route_service("/grpc.health.v1.Health/{call}", health)
        .route_service("/grpc.reflection.v1.ServerReflection/{call}", descriptors().build_v1()?)
        .route_service(
            "/grpc.reflection.v1alpha.ServerReflection/{call}",
            descriptors().build_v1alpha()?,
        ))
}

/// Admits inference requests before they are decoded, keeps their time, and counts them.
async fn guard(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response {
    if request.uri().path() != INFER {
        return next.run(request).await;
    }
    let start = Instant::now();
    let limit = asked_timeout(request.headers())
        .map_or(service.settings().timeout, |asked| asked.min(service.settings().timeout));
    let deadline = Deadline::after(limit);
    request.extensions_mut().insert(deadline);
    let refuse = |error: Error| Status::from(error).into_http();
    let response = match service.admit() {
        Err(error) => refuse(error),
        Ok(_place) => deadline.bound(next.run(request)).await.unwrap_or_else(refuse),
    };
    let mut code = response
        .headers()
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
    let mut response = response;
    // A message above the limit is OUT_OF_RANGE to the library and RESOURCE_EXHAUSTED to callers.
    if code == Code::OutOfRange {
        response = refuse(Error::TooLarge { limit: service.settings().max_body });
        code = Code::ResourceExhausted;
    }
    let seconds = start.elapsed().as_secs_f64();
    service.metrics().request(Protocol::Grpc, Outcome::of_grpc(code), seconds);
    response.map(axum::body::Body::new)
}

/// The caller's own limit: the header `grpc-timeout`, up to 8 digits and a unit.
fn asked_timeout(headers: &http::HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

struct Inference(Arc<Service>);

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(
        &self,
        _: tonic::Request<wire::ServerLiveRequest>,
    ) -> Result<tonic::Response<wire::ServerLiveResponse>, Status> {
        Ok(wire::ServerLiveResponse { live: true }.into())
    }

    async fn server_ready(
        &self,
        _: tonic::Request<wire::ServerReadyRequest>,
    ) -> Result<tonic::Response<wire::ServerReadyResponse>, Status> {
        Ok(wire::ServerReadyResponse { ready: self.0.ready().is_ok() }.into())
    }

    async fn model_ready(
        &self,
        request: tonic::Request<wire::ModelReadyRequest>,
    ) -> Result<tonic::Response<wire::ModelReadyResponse>, Status> {
        let request = request.into_inner();
        self.0.resolve(&request.name, &request.version)?;
        Ok(wire::ModelReadyResponse { ready: self.0.ready().is_ok() }.into())
    }

    async fn server_metadata(
        &self,
        _: tonic::Request<wire::ServerMetadataRequest>,
    ) -> Result<tonic::Response<wire::ServerMetadataResponse>, Status> {
        Ok(wire::ServerMetadataResponse {
            name: SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        }
        .into())
    }

    async fn model_metadata(
        &self,
        request: tonic::Request<wire::ModelMetadataRequest>,
    ) -> Result<tonic::Response<wire::ModelMetadataResponse>, Status> {
        let tensors = |specs: &[TensorSpec]| {
            specs
                .iter()
                .map(|spec| TensorMetadata {
                    name: spec.name.clone(),
                    datatype: spec.datatype.name().to_owned(),
                    shape: spec.wire_shape(),
                })
                .collect()
        };
        let request = request.into_inner();
        self.0.resolve(&request.name, &request.version)?;
        let signature = self.0.signature()?;
        Ok(wire::ModelMetadataResponse {
            name: request.name,
            versions: vec![self.0.settings().version.clone()],
            platform: PLATFORM.to_owned(),
            inputs: tensors(&signature.inputs),
            outputs: tensors(&signature.outputs),
        }
        .into())
    }

    async fn model_infer(
        &self,
        request: tonic::Request<wire::ModelInferRequest>,
    ) -> Result<tonic::Response<wire::ModelInferResponse>, Status> {
        let deadline = request
            .extensions()
            .get::<Deadline>()
            .copied()
            .unwrap_or_else(|| Deadline::after(self.0.settings().timeout));
        let request = request.into_inner();
        Ok(infer(&self.0, request, deadline).await?.into())
    }
}

async fn infer(
    service: &Service,
    request: wire::ModelInferRequest,
    deadline: Deadline,
) -> Result<wire::ModelInferResponse, Error> {
    service.resolve(&request.model_name, &request.model_version)?;
    let signature = service.signature()?;
    let raw = !request.raw_input_contents.is_empty();
    let inputs = read_inputs(signature, request.inputs, request.raw_input_contents)?;
    let wanted = signature.wanted(request.outputs.iter().map(|output| output.name.as_str()))?;
    let tensors = service.infer(inputs, wanted.clone(), deadline).await?;
    let (outputs, raw_output_contents) = write_outputs(signature, &wanted, &tensors, raw)?;
    Ok(wire::ModelInferResponse {
        model_name: service.settings().model.clone(),
        model_version: service.settings().version.clone(),
        id: request.id,
        parameters: Default::default(),
        outputs,
        raw_output_contents,
    })
}

fn read_inputs(
    signature: &Signature,
    inputs: Vec<InferInputTensor>,
    raw: Vec<impl AsRef<[u8]>>,
) -> Result<Vec<(usize, Tensor)>, Error> {
    if !raw.is_empty() && raw.len() != inputs.len() {
        return Err(Error::Malformed(format!(
            "raw_input_contents has {} entries for {} inputs; it takes one for each or none",
            raw.len(),
            inputs.len()
        )));
    }
    let mut tensors = Vec::with_capacity(inputs.len().min(signature.inputs.len()));
    for (index, input) in inputs.into_iter().enumerate() {
        let (place, spec) = signature.input(&input.name)?;
        let shape = spec.admit(&input.datatype, &input.shape)?;
        let contents = |why: String| InputError::Contents { name: input.name.clone(), why };
        let elements = match (raw.get(index), input.contents) {
            (Some(bytes), None) => {
                spec.count_bytes(&shape, bytes.as_ref().len())?;
                Elements::from_bytes(spec.datatype, bytes.as_ref())
            }
            (Some(_), Some(_)) => {
                let why = "has contents although raw_input_contents is used".to_owned();
                return Err(contents(why).into());
            }
            (None, Some(given)) => {
                let field = filled(&given);
                let right = field_of(spec.datatype).ok_or_else(|| {
                    contents(format!("{} travels in raw_input_contents only", spec.datatype))
                })?;
                if field.iter().any(|field| *field != right) {
                    return Err(contents(format!(
                        "{} belongs into {right}, but {} was filled",
                        spec.datatype,
                        field.join(" and ")
                    ))
                    .into());
                }
                read_contents(spec, given)
            }
            (None, None) => {
                return Err(
                    contents("has neither contents nor raw_input_contents".to_owned()).into()
                );
            }
        };
        tensors.push((place, spec.tensor(shape, elements)?));
    }
    Ok(tensors)
}

/// The field of the contents that a data type belongs into.
fn field_of(datatype: Datatype) -> Option<&'static str> {
    Some(match datatype {
        Datatype::Bool => "bool_contents",
        Datatype::Int8 | Datatype::Int32 => "int_contents",
        Datatype::UInt8 => "uint_contents",
        Datatype::Int64 => "int64_contents",
        Datatype::Fp32 => "fp32_contents",
        Datatype::Fp64 => "fp64_contents",
        Datatype::Fp16 => return None,
    })
}

/// The fields that are not empty.
fn filled(contents: &wire::InferTensorContents) -> Vec<&'static str> {
    [
        ("bool_contents", contents.bool_contents.is_empty()),
        ("int_contents", contents.int_contents.is_empty()),
        ("int64_contents", contents.int64_contents.is_empty()),
        ("uint_contents", contents.uint_contents.is_empty()),
        ("uint64_contents", contents.uint64_contents.is_empty()),
        ("fp32_contents", contents.fp32_contents.is_empty()),
        ("fp64_contents", contents.fp64_contents.is_empty()),
        ("bytes_contents", contents.bytes_contents.is_empty()),
    ]
    .into_iter()
    .filter_map(|(name, empty)| (!empty).then_some(name))
    .collect()
}

fn read_contents(
    spec: &TensorSpec,
    contents: wire::InferTensorContents,
) -> Result<Elements, crate::tensor::BadElement> {
    let datatype = spec.datatype;
    match datatype {
        Datatype::Bool => {
            Ok(Elements::I32(contents.bool_contents.into_iter().map(i32::from).collect()))
        }
        Datatype::Int32 => Ok(Elements::I32(contents.int_contents)),
        Datatype::Int8 => {
            Elements::from_whole(datatype, contents.int_contents.into_iter().map(i64::from))
        }
        Datatype::UInt8 => {
            Elements::from_whole(datatype, contents.uint_contents.into_iter().map(i64::from))
        }
        Datatype::Int64 => Elements::from_whole(datatype, contents.int64_contents.into_iter()),
        // FP16 was refused before, since it has no field.
        Datatype::Fp16 | Datatype::Fp32 => Ok(Elements::F32(contents.fp32_contents)),
        Datatype::Fp64 => Elements::from_real(datatype, contents.fp64_contents.into_iter()),
    }
}

/// All outputs as bytes or all as contents: the protocol knows no mixture.
fn write_outputs(
    signature: &Signature,
    wanted: &[usize],
    tensors: &[Tensor],
    raw: bool,
) -> Result<(Vec<InferOutputTensor>, Vec<Vec<u8>>), Error> {
    let specs = || wanted.iter().map(|place| &signature.outputs[*place]);
    let raw = raw || specs().any(|spec| field_of(spec.datatype).is_none());
    let mut outputs = Vec::with_capacity(tensors.len());
    let mut bytes = Vec::new();
    for (spec, tensor) in specs().zip(tensors) {
        let broken = || Error::BrokenSignature(format!("output {spec} is of another data type"));
        let contents = if raw {
            bytes.push(tensor.elements.to_bytes(spec.datatype).ok_or_else(broken)?);
            None
        } else {
            Some(write_contents(spec.datatype, &tensor.elements).ok_or_else(broken)?)
        };
        outputs.push(InferOutputTensor {
            name: spec.name.clone(),
            datatype: spec.datatype.name().to_owned(),
            shape: tensor.shape.iter().map(|n| i64::try_from(*n).unwrap_or(i64::MAX)).collect(),
            parameters: Default::default(),
            contents,
        });
    }
    Ok((outputs, bytes))
}

fn write_contents(datatype: Datatype, elements: &Elements) -> Option<wire::InferTensorContents> {
    let mut contents = wire::InferTensorContents::default();
    match datatype {
        Datatype::Bool => contents.bool_contents = elements.to_whole()?.map(|n| n != 0).collect(),
        Datatype::Int8 | Datatype::Int32 => contents.int_contents = elements.to_whole()?.collect(),
        Datatype::UInt8 => {
            contents.uint_contents = elements.to_whole()?.map(i32::cast_unsigned).collect();
        }
        Datatype::Int64 => {
            contents.int64_contents = elements.to_whole()?.map(i64::from).collect();
        }
        Datatype::Fp16 | Datatype::Fp32 => contents.fp32_contents = elements.as_real()?.to_vec(),
        Datatype::Fp64 => {
            contents.fp64_contents = elements.as_real()?.iter().map(|x| f64::from(*x)).collect();
        }
    }
    Some(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iris() -> Signature {
        Signature::from_onnx(include_bytes!("../../models/iris/model.onnx")).unwrap()
    }

    fn input(contents: Option<wire::InferTensorContents>) -> Vec<InferInputTensor> {
        vec![InferInputTensor {
            name: "features".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 4],
            parameters: Default::default(),
            contents,
        }]
    }

    fn fp32(numbers: &[f32]) -> wire::InferTensorContents {
        wire::InferTensorContents { fp32_contents: numbers.to_vec(), ..Default::default() }
    }

    fn error(inputs: Vec<InferInputTensor>, raw: Vec<Vec<u8>>) -> String {
        read_inputs(&iris(), inputs, raw).unwrap_err().to_string()
    }

    #[test]
    fn contents_and_raw_contents_mean_the_same() {
        let numbers = [1.0f32, 2.0, 3.0, 4.0];
        let raw: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let none = Vec::<Vec<u8>>::new();
        assert_eq!(
            read_inputs(&iris(), input(Some(fp32(&numbers))), none).unwrap(),
            read_inputs(&iris(), input(None), vec![raw]).unwrap()
        );
    }

    #[test]
    fn elements_in_a_wrong_place_are_named() {
        let wrong = wire::InferTensorContents { int_contents: vec![1; 4], ..Default::default() };
        let text = error(input(Some(wrong)), vec![]);
        assert!(text.contains("fp32_contents") && text.contains("int_contents"), "{text}");
        assert!(
            error(input(Some(fp32(&[1.0; 4]))), vec![vec![0; 16]]).contains("raw_input_contents")
        );
        assert!(error(input(None), vec![]).contains("neither"));
        assert!(error(input(None), vec![vec![0; 15]]).contains("15 bytes"));
        assert!(error(input(None), vec![vec![0; 16]; 2]).contains("2 entries for 1 inputs"));
        assert!(error(input(Some(fp32(&[1.0; 3]))), vec![]).contains("3 elements"));
    }

    #[test]
    fn the_callers_timeout_is_read() {
        let asked = |text: &'static str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("grpc-timeout", http::HeaderValue::from_static(text));
            asked_timeout(&headers)
        };
        assert_eq!(asked("250m"), Some(Duration::from_millis(250)));
        assert_eq!(asked("2S"), Some(Duration::from_secs(2)));
        assert_eq!(asked("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for text in ["", "S", "1", "1x", "-1S", "123456789S", "1 S"] {
            assert_eq!(asked(text), None, "{text}");
        }
    }
}
