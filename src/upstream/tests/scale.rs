//! Figures of many names: lookups a second, and memory. They are printed and never asserted; the assertion is that every
//! name is found and found again. `GANGPLANK_UPSTREAM_FIGURES` sets the number of names, for instance
//! `GANGPLANK_UPSTREAM_FIGURES=10000 cargo test --release --lib upstream::tests::scale -- --nocapture`.

use std::{env, fs, thread, time::Instant};

use tokio::{runtime::Builder, sync::oneshot, time::timeout};

use super::{
    super::Timing,
    WAIT_TIMEOUT, addresses, lookups, name, options,
    server::{Server, Zone},
};

/// Names by default: enough to see that it works.
const NAMES: usize = 500;

/// Bytes of this process in memory.
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = pages.split(' ').nth(1).expect("resident pages").parse().expect("a number");
    pages * 4096
}

#[test]
fn many_names_are_found_and_found_again() {
    let names: usize = env::var("GANGPLANK_UPSTREAM_FIGURES").map_or(NAMES, |text| text.parse().expect("a number"));
    // The server has a thread of its own.
    let (started, address) = std::sync::mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = thread::spawn(move || {
        Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(async {
            let server = Server::start(|question, _| {
                // Each name has the same two addresses, behind one alias.
                let asked = question.queries[0].name().to_string();
                let records = [
                    (&*asked, 300, "host.test."),
                    ("host.test.", 300, "192.0.2.1"),
                    ("host.test.", 300, "2001:db8::1"),
                ];
                vec![Zone::new(&records).answer(question).to_vec().expect("it can be encoded")]
            })
            .await;
            server.keep_no_record();
            started.send(server.address).expect("the test waits");
            let _dropped = stopped.await;
        });
    });
    let address = address.recv().expect("it starts");
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut options = options(&[]);
        options.servers = vec![address];
        // The first lookups take memory that later ones use again.
        let mut lookups = lookups(options, Timing::new());
        lookups.want(name("warm.test"));
        assert_eq!(timeout(WAIT_TIMEOUT, lookups.next()).await.expect("it is found").len(), 1);
        let before = resident();
        let begun = Instant::now();
        (0..names).for_each(|n| lookups.want(name(&format!("name-{n}.test"))));
        let expected = addresses(&["192.0.2.1", "2001:db8::1"], 300);
        let mut left = names;
        while left > 0 {
            let batch = timeout(WAIT_TIMEOUT, lookups.next()).await.expect("all are found");
            assert!(batch.iter().all(|(_, status)| *status.resolution == expected), "{batch:?}");
            left -= batch.len();
        }
        let took = begun.elapsed();
        let memory = resident().saturating_sub(before);
        println!(
            "{names} names: {:.0} lookups (two questions each) a second, {} bytes a name, {:.1} MiB in all",
            names as f64 / took.as_secs_f64(),
            memory / names,
            memory as f64 / f64::from(1 << 20),
        );
        assert_eq!(lookups.names.len(), names + 1);
        assert_eq!(lookups.timers.len(), names + 1, "each waits for its next lookup");
    });
    stop.send(()).expect("the server runs");
    server.join().expect("no panic");
}
