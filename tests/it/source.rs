//! Reads Rust sources with `syn`: which items a file defines, which paths it names, and which file defines the item of
//! a path.
//!
//! Tokens of a macro call have no grammar, so every path in them counts. An item that only a macro defines belongs to
//! the file of its module.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use proc_macro2::{Spacing, Span, TokenStream, TokenTree};
use syn::{
    Attribute, ExprAwait, Field, ImplItem, Item, ItemUse, Macro, Meta, Signature, TraitItem, UseTree, Variant,
    Visibility,
    visit::{self, Visit},
};

/// Kind of a definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Type,
    Function,
    Field,
    Constant,
    Variant,
}

/// A named item, field or enum variant.
#[derive(Debug)]
pub(crate) struct Definition {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) line: usize,
    /// True for every visibility except private.
    pub(crate) is_public: bool,
    pub(crate) in_test: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Import,
    Reexport,
    Code,
}

/// A path in the code, such as `std::fs::File`. The keywords `async` and `await` count as paths.
#[derive(Debug)]
pub(crate) struct NamedPath {
    pub(crate) segments: Vec<String>,
    /// Line number, from 1.
    pub(crate) line: usize,
    /// Module that contains the path.
    pub(crate) module: String,
    pub(crate) usage: Use,
    pub(crate) in_test: bool,
}

impl NamedPath {
    /// Returns true if the path starts with these segments, given as `a::b`.
    pub(crate) fn starts_with(&self, prefix: &str) -> bool {
        let mut segments = self.segments.iter();
        prefix.split("::").all(|wanted| segments.next().is_some_and(|segment| segment == wanted))
    }
}

/// A parsed file.
pub(crate) struct SourceFile {
    /// Path of the file below the root of the sources, with `/` between its parts.
    pub(crate) name: String,
    pub(crate) text: String,
    pub(crate) is_test: bool,
    pub(crate) definitions: Vec<Definition>,
    pub(crate) paths: Vec<NamedPath>,
}

/// Names in the scope of one module: its items, its imports, and its glob imports.
#[derive(Default)]
struct Module {
    file: usize,
    items: BTreeSet<String>,
    imports: BTreeMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
}

#[derive(Clone)]
enum Resolved {
    Module(String),
    /// An item of the file with this index.
    Item(usize),
}

/// All source files, and the modules that they define. The packages that the root package re-exports count as its
/// modules.
pub(crate) struct Sources {
    pub(crate) files: Vec<SourceFile>,
    modules: BTreeMap<String, Module>,
}

/// Returns name and text of every file below `folder` with one of these extensions.
pub(crate) fn read_folder(folder: &Path, extensions: &[&str]) -> Vec<(String, String)> {
    let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| extensions.iter().any(|wanted| found == *wanted)) {
                let name = path.strip_prefix(folder).expect("below the folder").to_string_lossy().into_owned();
                files.push((name, fs::read_to_string(&path).expect("the file can be read")));
            }
        }
    }
    files.sort();
    files
}

impl Sources {
    /// Parses source files, given as pairs of name and text. Panics on a syntax error.
    pub(crate) fn parse(texts: Vec<(String, String)>) -> Self {
        let mut sources = Self { files: Vec::new(), modules: BTreeMap::new() };
        let mut test_modules = Vec::new();
        for (index, (name, text)) in texts.into_iter().enumerate() {
            let syntax = syn::parse_file(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
            let mut reader = FileReader::new(index, &name);
            reader.visit_file(&syntax);
            test_modules.append(&mut reader.test_modules);
            sources.modules.append(&mut reader.modules);
            let (definitions, paths) = (reader.definitions, reader.paths);
            sources.files.push(SourceFile { name, text, is_test: false, definitions, paths });
        }
        for file in &mut sources.files {
            let module = module_of(&file.name);
            file.is_test = file.name.ends_with("tests.rs") || test_modules.iter().any(|test| is_within(&module, test));
            file.paths.iter_mut().for_each(|path| path.in_test |= file.is_test);
            file.definitions.iter_mut().for_each(|definition| definition.in_test |= file.is_test);
        }
        sources
    }

    /// Returns the index of the file that defines the item of `path`. Returns `None` for a module, and for a path
    /// outside of these sources.
    pub(crate) fn defining_file(&self, path: &NamedPath) -> Option<usize> {
        match self.resolve(&path.module, &path.segments, 0)? {
            Resolved::Item(file) => Some(file),
            Resolved::Module(_) => None,
        }
    }

    /// Finds the module or item of a path that is used in `module`. `depth` bounds the recursion through imports.
    fn resolve(&self, module: &str, path: &[String], depth: usize) -> Option<Resolved> {
        let (first, mut rest) = path.split_first().filter(|_| depth < 20)?;
        let mut target = match first.as_str() {
            "crate" => Resolved::Module(crate_root(module).to_owned()),
            "strandline" if module == "main" => Resolved::Module(String::new()),
            "strandline_core" => Resolved::Module(String::new()),
            "strandline_client" | "strandline_proto" => Resolved::Module(first["strandline_".len()..].to_owned()),
            "self" => Resolved::Module(module.to_owned()),
            "super" => Resolved::Module(parent(module).to_owned()),
            name => self.find(module, name, rest.is_empty(), depth)?,
        };
        while let Some((name, after)) = rest.split_first() {
            let Resolved::Module(at) = &target else { break };
            target = match name.as_str() {
                "super" => Resolved::Module(parent(at).to_owned()),
                "self" => target,
                name => match self.find(at, name, after.is_empty(), depth) {
                    Some(found) => found,
                    None => Resolved::Item(self.modules.get(at)?.file),
                },
            };
            rest = after;
        }
        Some(target)
    }

    /// Looks a name up in a module: its items and child modules, then its imports, then its glob imports. If the name
    /// `is_last` in its path, an item is preferred to a child module of the same name, else the child module.
    fn find(&self, module: &str, name: &str, is_last: bool, depth: usize) -> Option<Resolved> {
        let child = join(module, name);
        let child = self.modules.contains_key(&child).then_some(Resolved::Module(child));
        let Some(scope) = self.modules.get(module) else { return child };
        let item = scope.items.contains(name).then_some(Resolved::Item(scope.file));
        let own = if is_last { item.or(child) } else { child.or(item) };
        let imported = || self.resolve(module, scope.imports.get(name)?, depth + 1);
        own.or_else(imported).or_else(|| {
            scope.globs.iter().find_map(|glob| match self.resolve(module, glob, depth + 1)? {
                Resolved::Module(from) if from != module => self.find(&from, name, is_last, depth + 1),
                _ => None,
            })
        })
    }
}

/// Returns the path of the module in the file `name`: `log::disk` for `log/disk/mod.rs`.
fn module_of(name: &str) -> String {
    let path = name.trim_end_matches(".rs");
    if path == "lib" || path == "mod" {
        return String::new();
    }
    path.trim_end_matches("/mod").replace('/', "::")
}

/// Returns the module to which `crate` refers inside `module`: `client` or `proto` in these packages, else the root.
fn crate_root(module: &str) -> &str {
    ["client", "proto"].into_iter().find(|package| is_within(module, package)).unwrap_or_default()
}

fn join(module: &str, name: &str) -> String {
    if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") }
}

fn parent(module: &str) -> &str {
    module.rsplit_once("::").map_or("", |(parent, _)| parent)
}

fn is_within(module: &str, outer: &str) -> bool {
    module.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Returns true for `#[test]` and for a `#[cfg]` that only holds in tests.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("cfg") => {
            let condition = list.tokens.to_string();
            condition == "test" || condition.starts_with("all") && condition.contains("test")
        }
        _ => false,
    })
}

/// Visitor that collects the definitions, imports and paths of one file.
struct FileReader {
    file: usize,
    module: String,
    in_test: bool,
    modules: BTreeMap<String, Module>,
    test_modules: Vec<String>,
    definitions: Vec<Definition>,
    paths: Vec<NamedPath>,
}

impl FileReader {
    fn new(file: usize, name: &str) -> Self {
        let module = module_of(name);
        let scope = Module { file, ..Module::default() };
        Self {
            file,
            modules: BTreeMap::from([(module.clone(), scope)]),
            module,
            in_test: false,
            test_modules: Vec::new(),
            definitions: Vec::new(),
            paths: Vec::new(),
        }
    }

    /// Returns the scope of the current module. Creates it if it is missing.
    fn scope(&mut self) -> &mut Module {
        let module = Module { file: self.file, ..Module::default() };
        self.modules.entry(self.module.clone()).or_insert(module)
    }

    fn define(&mut self, kind: Kind, name: &proc_macro2::Ident, is_public: bool) {
        let (line, in_test) = (name.span().start().line, self.in_test);
        let name = name.to_string();
        self.definitions.push(Definition { kind, name, line, is_public, in_test });
    }

    fn define_item(&mut self, kind: Kind, name: &proc_macro2::Ident, visibility: &Visibility) {
        self.define(kind, name, !matches!(visibility, Visibility::Inherited));
        self.scope().items.insert(name.to_string());
    }

    fn add_path(&mut self, segments: Vec<String>, span: Span, usage: Use) {
        let (module, in_test) = (self.module.clone(), self.in_test);
        self.paths.push(NamedPath { segments, line: span.start().line, module, usage, in_test });
    }

    /// Adds the imports of a `use` tree to the scope and to the paths. `prefix` is the path before `tree`.
    fn add_import(&mut self, tree: &UseTree, prefix: &[String], usage: Use) {
        let (name, alias) = match tree {
            UseTree::Path(path) => {
                let prefix = [prefix, &[path.ident.to_string()]].concat();
                return self.add_import(&path.tree, &prefix, usage);
            }
            UseTree::Group(group) => return group.items.iter().for_each(|item| self.add_import(item, prefix, usage)),
            UseTree::Glob(glob) => {
                self.add_path(prefix.to_vec(), glob.star_token.spans[0], usage);
                return self.scope().globs.push(prefix.to_vec());
            }
            UseTree::Name(name) => (&name.ident, &name.ident),
            UseTree::Rename(name) => (&name.ident, &name.rename),
        };
        let last = (name != "self").then(|| name.to_string());
        let path: Vec<String> = prefix.iter().cloned().chain(last).collect();
        let alias = if alias == "self" { path.last().cloned().unwrap_or_default() } else { alias.to_string() };
        self.add_path(path.clone(), name.span(), usage);
        self.scope().imports.entry(alias).or_insert(path);
    }

    /// Adds the paths in the tokens of a macro. Names of fields and methods are not paths.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let punct = |at: usize, c: char| matches!(tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == c);
        let separator = |at: usize| {
            punct(at, ':')
                && punct(at + 1, ':')
                && matches!(&tokens[at], TokenTree::Punct(p) if p.spacing() == Spacing::Joint)
        };
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.add_tokens(group.stream()),
                TokenTree::Ident(first) => {
                    let (is_member, mut segments) = (at > 0 && punct(at - 1, '.'), vec![first.to_string()]);
                    while let Some(TokenTree::Ident(next)) = tokens.get(at + 3).filter(|_| separator(at + 1)) {
                        segments.push(next.to_string());
                        at += 3;
                    }
                    let is_field_name = segments.len() == 1 && punct(at + 1, ':');
                    if !is_member && !is_field_name {
                        self.add_path(segments, first.span(), Use::Code);
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Adds the items that the tokens of a macro call at the level of items define.
    fn add_macro_items(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for pair in tokens.windows(2) {
            let [TokenTree::Ident(keyword), TokenTree::Ident(name)] = pair else { continue };
            match keyword.to_string().as_str() {
                "struct" | "enum" | "trait" | "type" => self.define_item(Kind::Type, name, &Visibility::Inherited),
                "fn" => self.define_item(Kind::Function, name, &Visibility::Inherited),
                "const" | "static" => self.define_item(Kind::Constant, name, &Visibility::Inherited),
                _ => {}
            }
        }
    }

    /// Runs `read` for an item with these attributes. Everything that `read` adds counts as test code if the attributes
    /// limit the item to tests.
    fn within(&mut self, attributes: &[Attribute], read: impl FnOnce(&mut Self)) {
        let outer = self.in_test;
        self.in_test |= is_test(attributes);
        read(self);
        self.in_test = outer;
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

impl<'ast> Visit<'ast> for FileReader {
    fn visit_item(&mut self, item: &'ast Item) {
        self.within(attributes(item), |reader| {
            let outer = reader.module.clone();
            match item {
                Item::Struct(item) => reader.define_item(Kind::Type, &item.ident, &item.vis),
                Item::Enum(item) => reader.define_item(Kind::Type, &item.ident, &item.vis),
                Item::Union(item) => reader.define_item(Kind::Type, &item.ident, &item.vis),
                Item::Trait(item) => reader.define_item(Kind::Type, &item.ident, &item.vis),
                Item::Type(item) => reader.define_item(Kind::Type, &item.ident, &item.vis),
                Item::Fn(item) => reader.define_item(Kind::Function, &item.sig.ident, &item.vis),
                Item::Const(item) => reader.define_item(Kind::Constant, &item.ident, &item.vis),
                Item::Static(item) => reader.define_item(Kind::Constant, &item.ident, &item.vis),
                Item::Macro(item) if item.ident.is_none() => reader.add_macro_items(item.mac.tokens.clone()),
                Item::Mod(item) => {
                    let inner = join(&outer, &item.ident.to_string());
                    if reader.in_test {
                        reader.test_modules.push(inner.clone());
                    }
                    if item.content.is_some() {
                        reader.module = inner;
                        reader.scope();
                    }
                }
                _ => {}
            }
            visit::visit_item(reader, item);
            reader.module = outer;
        });
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        let (attributes, kind, name, visibility) = match item {
            ImplItem::Fn(item) => (&item.attrs, Kind::Function, &item.sig.ident, &item.vis),
            ImplItem::Const(item) => (&item.attrs, Kind::Constant, &item.ident, &item.vis),
            _ => return visit::visit_impl_item(self, item),
        };
        self.within(attributes, |reader| {
            reader.define(kind, name, !matches!(visibility, Visibility::Inherited));
            visit::visit_impl_item(reader, item);
        });
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        if let TraitItem::Fn(function) = item {
            self.define(Kind::Function, &function.sig.ident, true);
        }
        visit::visit_trait_item(self, item);
    }

    fn visit_field(&mut self, field: &'ast Field) {
        self.within(&field.attrs, |reader| {
            if let Some(name) = &field.ident {
                reader.define(Kind::Field, name, !matches!(field.vis, Visibility::Inherited));
            }
            visit::visit_field(reader, field);
        });
    }

    fn visit_variant(&mut self, variant: &'ast Variant) {
        self.within(&variant.attrs, |reader| {
            reader.define(Kind::Variant, &variant.ident, true);
            visit::visit_variant(reader, variant);
        });
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let usage = if matches!(item.vis, Visibility::Inherited) { Use::Import } else { Use::Reexport };
        self.add_import(&item.tree, &[], usage);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.add_path(segments, path.segments[0].ident.span(), Use::Code);
        visit::visit_path(self, path);
    }

    fn visit_signature(&mut self, signature: &'ast Signature) {
        if let Some(word) = &signature.asyncness {
            self.add_path(vec!["async".to_owned()], word.span, Use::Code);
        }
        visit::visit_signature(self, signature);
    }

    fn visit_expr_await(&mut self, expression: &'ast ExprAwait) {
        self.add_path(vec!["await".to_owned()], expression.await_token.span, Use::Code);
        visit::visit_expr_await(self, expression);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.add_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    // Paths in attributes are not visited, because they are not code.
    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}
