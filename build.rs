//! Compiles `kernels/` with nvcc and declares them to Rust with bindgen, where a CUDA toolkit is found. Where none is,
//! the crate is built for the CPU alone.
//!
//! Read from the environment: `NVCC`, `CUDA_HOME`, `CUDA_PATH` (where the toolkit is), `LIBCLANG_PATH` (bindgen), and
//! `GLEANER_REQUIRE_CUDA`: set to 1, a missing toolkit and every compiler warning are errors. `GLEANER_COMMIT` is what records
//! of evaluations name as the commit, instead of that of the checkout.

use std::env;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Machine code for Ampere and Hopper, and PTX from which drivers make code for what came later. Code for 8.0 runs on
/// 8.6 and 8.9 too.
const ARCHITECTURES: [(&str, &str); 3] = [("compute_80", "sm_80"), HOPPER, ("compute_90", "compute_90")];

/// Files whose name ends in `_sm90` use instructions that this one alone has.
const HOPPER: (&str, &str) = ("compute_90a", "sm_90a");

/// What nvcc itself reads from the environment.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"];

/// Oldest toolkit that the kernels are written for.
const MIN_CUDA: (u32, u32) = (12, 8);

struct Toolkit {
    nvcc: PathBuf,
    /// What it says of itself.
    version: String,
    library_dir: PathBuf,
    include_dir: PathBuf,
}

fn main() {
    println!("cargo:rustc-check-cfg=cfg(gleaner_cuda, gleaner_nvtx)");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "LIBCLANG_PATH", "GLEANER_REQUIRE_CUDA", "GLEANER_COMMIT"]
        .iter()
        .chain(&NVCC_VARIABLES)
    {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let named = env::var("GLEANER_COMMIT").ok().filter(|commit| !commit.is_empty());
    if let Some(commit) = named.or_else(checked_out_commit) {
        println!("cargo:rustc-env=GLEANER_COMMIT={commit}");
    }
    let required = env::var("GLEANER_REQUIRE_CUDA").is_ok_and(|value| value == "1");
    let built = find_toolkit().and_then(|toolkit| {
        clang_sys::load().map_err(|_| {
            "found CUDA, but not libclang, which bindgen needs; install it (pip install libclang) and set LIBCLANG_PATH to its folder".to_owned()
        })?;
        Ok(toolkit)
    });
    let architectures = match built {
        Ok(toolkit) => {
            compile(&toolkit, required);
            if env::var_os("CARGO_FEATURE_NVTX").is_some() {
                compile_ranges(&toolkit);
            }
            println!("cargo:rustc-cfg=gleaner_cuda");
            ARCHITECTURES.map(|(_, code)| code).join(" ")
        }
        Err(reason) if required => {
            println!("cargo:error=GLEANER_REQUIRE_CUDA is set, but {reason}");
            String::new()
        }
        Err(reason) => {
            println!("cargo:warning=building for the CPU only: {reason}");
            String::new()
        }
    };
    println!("cargo:rustc-env=GLEANER_CUDA_ARCHITECTURES={architectures}");
}

/// The commit that git last checked out or made here; none outside a checkout.
fn checked_out_commit() -> Option<String> {
    const LOG: &str = ".git/logs/HEAD";
    let log = std::fs::read_to_string(LOG).ok()?;
    println!("cargo:rerun-if-changed={LOG}");
    Some(log.lines().last()?.split(' ').nth(1)?.to_owned())
}

/// The toolkit, or in words why there is none.
fn find_toolkit() -> Result<Toolkit, String> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let under = |root: PathBuf| root.join("bin/nvcc");
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates = [set("NVCC"), set("CUDA_HOME").map(under), set("CUDA_PATH").map(under)]
        .into_iter()
        .flatten()
        .chain(env::split_paths(&path).map(|folder| folder.join("nvcc")))
        .chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]);
    let nvcc = candidates.into_iter().find(|candidate| candidate.is_file()).ok_or_else(|| {
        let (major, minor) = MIN_CUDA;
        format!("found no CUDA toolkit; to build the kernels in, install CUDA {major}.{minor} or newer and set CUDA_HOME to its folder")
    })?;

    let output =
        Command::new(&nvcc).arg("--version").output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_once("release ").and_then(|(_, rest)| {
        let (major, rest) = rest.split_once('.')?;
        Some((major.parse().ok()?, rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?))
    });
    if version.is_none_or(|version: (u32, u32)| version < MIN_CUDA) {
        let (major, minor) = MIN_CUDA;
        return Err(format!("{} is older than CUDA {major}.{minor}; set CUDA_HOME to a newer one", nvcc.display()));
    }

    // A link in PATH may lead elsewhere: libraries and headers lie beside the real file.
    let real = nvcc.canonicalize().unwrap_or_else(|_| nvcc.clone());
    let roots: Vec<&Path> = [&nvcc, &real].into_iter().filter_map(|nvcc| nvcc.parent()?.parent()).collect();
    let beside = |folders: &[&str], file: &str| {
        let places = roots.iter().flat_map(|root| folders.iter().map(move |folder| root.join(folder)));
        let found = places.into_iter().find(|folder| folder.join(file).is_file());
        found.ok_or_else(|| format!("{} has no {file} beside it: the toolkit is not whole", nvcc.display()))
    };
    Ok(Toolkit {
        library_dir: beside(
            &["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"],
            "libcudart_static.a",
        )?,
        include_dir: beside(
            &["include", "targets/x86_64-linux/include", "targets/sbsa-linux/include"],
            "cuda_runtime.h",
        )?,
        nvcc,
        version: text,
    })
}

fn compile(toolkit: &Toolkit, strict: bool) {
    let mut files: Vec<PathBuf> = std::fs::read_dir("kernels")
        .expect("kernels/ is part of the crate")
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let with_extension = |wanted: &[&str]| -> Vec<PathBuf> {
        let is_wanted =
            |path: &&PathBuf| path.extension().is_some_and(|extension| wanted.iter().any(|&w| extension == w));
        files.iter().filter(is_wanted).cloned().collect()
    };
    let (sources, headers) = (with_extension(&["cu"]), with_extension(&["cuh", "h"]));

    // nvcc is called here rather than by cc, which compiles relocatable device code: calls where inlining belongs.
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let read = |path: &Path| std::fs::read(path).expect("a file of kernels/");
    let headers: Vec<Vec<u8>> = headers.iter().map(|path| read(path)).collect();
    // Named by what it is made from and with, so that one that is there already serves.
    let variables = NVCC_VARIABLES.map(env::var_os);
    let object = |source: &Path| {
        let mut hasher = DefaultHasher::new();
        let compiler = (&toolkit.nvcc, &toolkit.version, &variables, strict, read(Path::new("build.rs")));
        (compiler, read(source), &headers).hash(&mut hasher);
        let name = source.file_stem().expect("a file").to_string_lossy();
        out_dir.join(format!("{name}-{:016x}.o", hasher.finish()))
    };
    let nvcc = |source: &Path, object: &Path| {
        let mut nvcc = Command::new(&toolkit.nvcc);
        nvcc.args(["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-Wall,-Wextra", "-c"]);
        nvcc.arg("-I").arg(&toolkit.include_dir);
        let hopper_only = source.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_sm90"));
        let architectures = if hopper_only { &[HOPPER][..] } else { &ARCHITECTURES };
        nvcc.args(architectures.iter().map(|(arch, code)| format!("-gencode=arch={arch},code={code}")));
        if strict {
            nvcc.args(["-Werror=all-warnings", "-Xptxas=-Werror,-warn-spills,-warn-lmem-usage"]);
        }
        nvcc.arg(source).arg("-o").arg(object).output()
    };
    let make = |source: &Path| {
        let (object, unfinished) =
            (object(source), out_dir.join(source.file_name().expect("a file")).with_extension("o"));
        if !object.is_file() {
            report(source, nvcc(source, &unfinished));
            std::fs::rename(unfinished, object).expect("OUT_DIR can be written to");
        }
    };
    std::thread::scope(|scope| {
        let threads = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        let per_thread = sources.len().div_ceil(threads);
        for share in sources.chunks(per_thread.max(1)) {
            let make = &make;
            scope.spawn(move || share.iter().for_each(|source| make(source)));
        }
    });
    let objects: Vec<PathBuf> = sources.iter().map(|source| object(source)).collect();
    for entry in std::fs::read_dir(&out_dir).expect("cargo has made OUT_DIR").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "o") && !objects.contains(&path) {
            // Of an earlier build. One that cannot be removed does no harm.
            let _ = std::fs::remove_file(path);
        }
    }
    cc::Build::new().cpp(true).objects(&objects).compile("gleaner_kernels");
    println!("cargo:rustc-link-search=native={}", toolkit.library_dir.display());
    for library in ["static=cudart_static", "dl", "pthread", "rt"] {
        println!("cargo:rustc-link-lib={library}");
    }

    bindgen::Builder::default()
        .header("kernels/kernels.h")
        .allowlist_function("gleaner_.*")
        .allowlist_var("GLEANER_.*")
        .generate()
        .and_then(|bindings| {
            bindings
                .write_to_file(out_dir.join("kernels.rs"))
                .map_err(|error| bindgen::BindgenError::ClangDiagnostic(error.to_string()))
        })
        .expect("kernels.h is plain C");
}

/// Compiles the ranges for profilers, where the toolkit has NVTX's header: not all have it.
fn compile_ranges(toolkit: &Toolkit) {
    if !toolkit.include_dir.join("nvtx3/nvToolsExt.h").is_file() {
        println!(
            "cargo:warning=building without ranges for profilers: no nvtx3/nvToolsExt.h in {}; the wheel nvidia-nvtx has it",
            toolkit.include_dir.display()
        );
        return;
    }
    cc::Build::new().file("kernels/nvtx.c").include(&toolkit.include_dir).compile("gleaner_nvtx");
    println!("cargo:rustc-cfg=gleaner_nvtx");
}

/// Ends the build if nvcc failed on `source`, with its own words.
fn report(source: &Path, result: std::io::Result<Output>) {
    match result {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let words = [output.stdout, output.stderr].concat();
            panic!("nvcc failed on {}:\n{}", source.display(), String::from_utf8_lossy(&words));
        }
        Err(error) => panic!("nvcc does not start: {error}"),
    }
}
