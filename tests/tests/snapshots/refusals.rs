//! What is refused, and the words for it.

use super::scene::{Scene, paused};
use pageferry_client::{IncomingOptions, OutgoingOptions, Phase, SnapshotOptions};
use pageferry_tests::require;
use pageferry_tests::vmm::{PATIENCE, Tracker};
use std::path::Path;

#[test]
fn a_second_job_is_refused_while_a_snapshot_runs() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(4096);
    let endless = SnapshotOptions { bandwidth: 1, ..SnapshotOptions::default() };
    let job = scene.client().start_snapshot(&scene.path("image"), &endless).unwrap().job;
    // While an incoming migration is asked for, and until it is refused, the client lets nobody watch or pause the guest.
    scene.vmm.wait_phase(Phase::Saving, PATIENCE).unwrap();
    let refused = |error: String| assert!(error.contains("job 1 (snapshot) is running; wait or cancel it"), "{error}");
    refused(scene.client().start_snapshot(&scene.path("other"), &paused()).unwrap_err().to_string());
    refused(scene.vmm.start_outgoing("unix:/nowhere", &OutgoingOptions::default()).unwrap_err().sentence());
    refused(scene.vmm.start_incoming("unix:/nowhere", &IncomingOptions::default()).unwrap_err().sentence());
    refused(scene.client().remove_block(0).unwrap_err().to_string());
    refused(scene.vmm.set_tracker(Tracker::Log).unwrap_err().sentence());
    scene.client().cancel().unwrap();
    assert_eq!(scene.client().wait(job, PATIENCE).unwrap().phase, Phase::Cancelled);
}

#[test]
fn an_image_that_is_there_is_replaced_only_on_request() {
    let scene = Scene::full(100);
    scene.saved("image", &paused());
    let status = scene.save("image", &paused());
    assert!(status.error.contains("the file exists: choose another name, or have it replaced"), "{}", status.error);
    scene.write(1, 1);
    let (_, chain) = scene.saved("image", &SnapshotOptions { replace: true, ..paused() });
    scene.check(&chain);
    assert_eq!(scene.files(), ["image"]);
    let status = scene.save("image/below", &paused());
    assert!(status.error.contains("cannot create a file in its folder: Not a directory"), "{}", status.error);
    let status = scene.client().start_snapshot(Path::new("/"), &paused()).unwrap();
    let status = scene.client().wait(status.job, PATIENCE).unwrap();
    assert!(status.error.contains("path is not that of a file, from the root"), "{}", status.error);
}

#[test]
fn a_guest_under_write_protect_tracking_cannot_run_on_while_it_is_saved() {
    if !require::uffd() {
        return;
    }
    let scene = Scene::full(100);
    scene.vmm.set_tracker(Tracker::write_protect(scene.vmm.memory()).unwrap()).unwrap();
    let status = scene.save("image", &SnapshotOptions::default());
    assert_eq!(status.phase, Phase::Failed);
    assert!(status.error.contains("use mode paused"), "{}", status.error);
    scene.saved("image", &paused());
}
