// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The phases of several rows as bars, one below the other.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::phase::Phase;
use crate::{Error, Result, read, write};

/// The file's first lines.
const HEAD: &str = "# Instructions of the host per access, by phase; written by scripts/cost \
                    breakdown.\nhost,row,phase,instructions\n";

/// Colours that people who see fewer of them can tell apart, ours the strong ones.
const COLOURS: [RGBColor; Phase::ALL.len()] = [
    RGBColor(0xb0, 0xc4, 0xde),
    RGBColor(0xd9, 0xd9, 0xd9),
    RGBColor(0x8f, 0xa8, 0xc8),
    RGBColor(0x5b, 0x7d, 0xa8),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0xf0, 0xe4, 0x42),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x99, 0x99, 0x99),
];

const WIDTH: i32 = 960;
const LEFT: i32 = 210;
const RIGHT: i32 = 70;
const BAR: i32 = 18;
const STEP: i32 = 26;

/// A bar of the file.
struct Bar {
    host: String,
    row: String,
    phases: BTreeMap<String, f64>,
}

fn parse(path: &Path) -> Result<Vec<Bar>> {
    let text = read(path)?;
    let mut bars: Vec<Bar> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')).skip(1) {
        let words: Vec<&str> = line.split(',').collect();
        let parsed = match words[..] {
            [host, row, phase, count] => count.parse().ok().map(|count| (host, row, phase, count)),
            _ => None,
        };
        let (host, row, phase, count) =
            parsed.ok_or_else(|| Error::Content(path.into(), format!("what is '{line}'?")))?;
        if !matches!(bars.last(), Some(bar) if bar.host == host && bar.row == row) {
            bars.push(Bar {
                host: host.to_string(),
                row: row.to_string(),
                phases: BTreeMap::new(),
            });
        }
        if let Some(bar) = bars.last_mut() {
            bar.phases.insert(phase.to_string(), count);
        }
    }
    Ok(bars)
}

/// Puts the phases of a host's row into the file, where it was or at the host's end.
pub fn save(path: &Path, host: &str, row: &str, phases: &BTreeMap<Phase, f64>) -> Result<()> {
    let mut bars = if path.exists() {
        parse(path)?
    } else {
        Vec::new()
    };
    let phases = phases
        .iter()
        .map(|(phase, count)| (phase.name().to_string(), *count))
        .collect();
    match bars
        .iter_mut()
        .find(|bar| bar.host == host && bar.row == row)
    {
        Some(bar) => bar.phases = phases,
        None => {
            let end = bars.iter().rposition(|bar| bar.host == host);
            let bar = Bar {
                host: host.to_string(),
                row: row.to_string(),
                phases,
            };
            bars.insert(end.map_or(bars.len(), |end| end + 1), bar);
        }
    }
    let mut text = HEAD.to_string();
    for bar in &bars {
        for phase in Phase::ALL {
            if let Some(count) = bar.phases.get(phase.name()) {
                text.push_str(&format!(
                    "{},{},{},{count:.0}\n",
                    bar.host,
                    bar.row,
                    phase.name()
                ));
            }
        }
    }
    write(path, &text)
}

pub fn draw(data: &Path, svg: &Path) -> Result<()> {
    let bars = parse(data)?;
    let drawn = picture(&bars, svg);
    drawn.map_err(|error| Error::Chart(error.to_string()))
}

fn picture(bars: &[Bar], svg: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut hosts: Vec<&str> = bars.iter().map(|bar| bar.host.as_str()).collect();
    hosts.dedup();
    let used: Vec<usize> = (0..Phase::ALL.len())
        .filter(|&index| {
            let name = Phase::ALL[index].name();
            bars.iter()
                .any(|bar| bar.phases.get(name).is_some_and(|count| *count >= 0.5))
        })
        .collect();
    let legend_rows = used.len().div_ceil(5) as i32;
    let height = 40 + legend_rows * 22 + hosts.len() as i32 * 34 + bars.len() as i32 * STEP + 12;
    let most = bars
        .iter()
        .map(|bar| bar.phases.values().sum::<f64>())
        .fold(1.0, f64::max);
    let scale = f64::from(WIDTH - LEFT - RIGHT) / most;

    let area = SVGBackend::new(svg, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    let middle = |style: TextStyle<'static>, h| style.pos(Pos::new(h, VPos::Center));
    let put = |words: String, x, y, style: &TextStyle<'_>| {
        area.draw(&Text::new(words, (x, y), style.clone()))
    };

    let (title, label) = (text(19), text(16));
    put(
        "Instructions of the host per access".to_string(),
        12,
        12,
        &title,
    )?;
    for (place, &index) in used.iter().enumerate() {
        let x = 12 + (place % 5) as i32 * 185;
        let y = 42 + (place / 5) as i32 * 22;
        area.draw(&Rectangle::new(
            [(x, y), (x + 14, y + 14)],
            COLOURS[index].filled(),
        ))?;
        let name = Phase::ALL[index].name().to_string();
        put(name, x + 20, y + 7, &middle(label.clone(), HPos::Left))?;
    }

    let mut y = 40 + legend_rows * 22;
    for host in hosts {
        put(host.to_string(), 12, y + 10, &title)?;
        y += 34;
        for bar in bars.iter().filter(|bar| bar.host == host) {
            put(
                bar.row.clone(),
                LEFT - 10,
                y + BAR / 2,
                &middle(label.clone(), HPos::Right),
            )?;
            let mut sum = 0.0;
            for (index, phase) in Phase::ALL.iter().enumerate() {
                let count = bar.phases.get(phase.name()).copied().unwrap_or(0.0);
                if count <= 0.0 {
                    continue;
                }
                let ends = [sum, sum + count].map(|sum| LEFT + (sum * scale).round() as i32);
                let corners = [(ends[0], y), (ends[1], y + BAR)];
                area.draw(&Rectangle::new(corners, COLOURS[index].filled()))?;
                sum += count;
            }
            let x = LEFT + (sum * scale).round() as i32 + 6;
            put(
                format!("{sum:.0}"),
                x,
                y + BAR / 2,
                &middle(label.clone(), HPos::Left),
            )?;
            y += STEP;
        }
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;

    #[test]
    fn saved_rows_stay_in_their_place() {
        let path = env::temp_dir().join(format!("cost-{}.csv", process::id()));
        let phases = |count| BTreeMap::from([(Phase::Bus, count)]);
        for (host, row, count) in [
            ("x86_64", "one", 1.0),
            ("arm64", "one", 2.0),
            ("x86_64", "two", 3.0),
            ("x86_64", "one", 4.0),
        ] {
            save(&path, host, row, &phases(count)).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            ["x86_64,one,bus,4", "x86_64,two,bus,3", "arm64,one,bus,2"]
        );
    }
}
