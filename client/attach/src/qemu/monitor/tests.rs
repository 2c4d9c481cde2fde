// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::test_support::{DONE, GREETING, answers, serve, with_monitor};
use super::*;
use std::os::unix::net::UnixListener;

#[test]
fn events_between_a_command_and_its_answer_are_kept_in_order() {
    let answer = "{\"event\": \"STOP\", \"data\": {\"a\": 1}}\n{\"event\": \"RESUME\"}\n\
                  {\"return\": [1], \"id\": ID}\n{\"event\": \"RESET\"}\n";
    with_monitor(GREETING, &[DONE, answer], |monitor| {
        let mut monitor = monitor.unwrap();
        assert_eq!(monitor.command("query", Value::Null).unwrap(), json!([1]));
        let soon = Instant::now() + Duration::from_secs(10);
        let reset = monitor.wait_for_event(soon, |event| event.name == "RESET").unwrap().unwrap();
        assert_eq!(reset.content, Value::Null);
        let stop = monitor.wait_for_event(soon, |_| true).unwrap().unwrap();
        assert_eq!(stop, Event { name: "STOP".into(), content: json!({"a": 1}) });
        let resume = monitor.wait_for_event(soon, |_| true).unwrap().unwrap();
        assert_eq!(resume.name, "RESUME");
    });
}

#[test]
fn a_late_answer_to_an_earlier_command_is_not_the_answer_to_this_one() {
    let answer = "{\"return\": \"late\", \"id\": 1}\n{\"return\": \"now\", \"id\": ID}\n";
    with_monitor(GREETING, &[DONE, answer], |monitor| {
        assert_eq!(monitor.unwrap().command("query", Value::Null).unwrap(), json!("now"));
    });
}

#[test]
fn a_refusal_has_the_words_of_qemu() {
    let answer =
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": ID}\n";
    with_monitor(GREETING, &[DONE, answer], |monitor| {
        let error = monitor.unwrap().command("query", Value::Null).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses query: no such thing");
    });
}

#[test]
fn what_is_not_qmp_is_an_error_that_quotes_it() {
    for (greeting, quoted) in [("hello\n", "JSON: hello"), ("{\"a\": 1}\n", "a greeting")] {
        with_monitor(greeting, &[], |monitor| {
            let error = monitor.unwrap_err().to_string();
            assert!(error.contains(quoted), "{error}");
        });
    }
}

#[test]
fn broken_connection_is_made_again_by_the_next_command() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The first one ends at its second command.
            serve(&listener, GREETING, answers(&[DONE]));
            serve(&listener, GREETING, answers(&[DONE, "{\"return\": 7, \"id\": ID}\n"]))
        });
        let mut monitor = Monitor::connect(&path).unwrap();
        let error = monitor.command("stop", Value::Null).unwrap_err();
        assert!(matches!(error, MonitorError::Broken { source: None }), "{error}");
        assert_eq!(monitor.command("cont", Value::Null).unwrap(), 7);
    });
}

#[test]
fn the_end_of_qemu_is_a_broken_connection() {
    with_monitor(GREETING, &[DONE], |monitor| {
        let error = monitor.unwrap().command("quit", Value::Null).unwrap_err();
        assert!(matches!(error, MonitorError::Broken { source: None }), "{error}");
    });
}
